"""`linear`: the one place where a weight meets activations, and what is known of its product.

Layers never look at how a weight is stored; they call `linear(x, w)`, and the leaf's product decides.
"""

import contextlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import cpu_kernels
from mlspecqd_jax.weights.products import multiply, product_of
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import BLOCK, best_product


def linear(x: jax.Array, w: jax.Array | QuantizedArray, *, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x @ w.T over the last axis of x, accumulated in f32.

    Args:
      x: activations [..., K].
      w: weight [N, K]; a plain one is used in its own dtype, a quantized one by the product that it is arranged for, or else by the
        best that reads it as it is stored.
      out_dtype: dtype of the result; None gives x's (the head asks for f32).

    Returns:
      [..., N].
    """
    y = multiply(x.reshape(-1, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], w.shape[0]).astype(out_dtype or x.dtype)


def row_multiple(w: jax.Array | QuantizedArray, dtype: str, chip: str, mesh: Mesh | None = None) -> int | None:
    """Return to how many rows windows are padded so that `linear` computes a row alike for all of them; None if that is not known.

    Args:
      w: weight.
      dtype: of the activations; a plain weight is used in its own.
      chip: of `pallas_kernels.chip_of`, or the platform, of the device that runs it.
      mesh: over which it is split, or None.
    """
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return product_of(w, dtype, chip).row_multiple(chip, str(getattr(w, "dtype", dtype)))


def implementation(chip: str) -> str:
    """Name what `linear` runs in bfloat16 on a chip (of `pallas_kernels.chip_of`), for plain and for quantized weights."""
    if chip != "cpu":
        kernel = {"tpu": "Pallas TPU kernel", "gpu": "Pallas GPU kernel"}
        mxfp4 = best_product(chip, "bfloat16", BLOCK, BLOCK).name
        return f"XLA dot; {kernel.get(mxfp4, f'XLA ({mxfp4})')} for mxfp4"
    bf16, mxfp4 = cpu_kernels.isas("matmul"), cpu_kernels.isas("mxfp4_matmul")
    if not bf16:
        return "XLA dot, at least two rows"
    mx8 = cpu_kernels.isas("mx8_matmul")
    return (
        f"C++ for bfloat16 ({bf16[0]}), float16 and float32, for mxfp4 ({mxfp4[0]}, activations in 8 bits) and for the other MX "
        f"formats ({mx8[0]})"
    )
