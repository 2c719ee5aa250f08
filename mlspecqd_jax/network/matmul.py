"""`linear`: the one place where a weight meets activations.

Layers never look at how a weight is stored; they call `linear(x, w)` and `linear` dispatches on the leaf.
"""

import functools

import jax
import jax.numpy as jnp

import cpu_kernels
from mlspecqd_jax.weights.layouts import LaidOut, laid_out_product
from mlspecqd_jax.weights.mx import FORMATS, MXArray, MXFP4Array
from pallas_kernels import BLOCK, bf16_matmul, choose, mx_matmul, mxfp4_matmul


def linear(x: jax.Array, w: jax.Array | MXFP4Array | MXArray | LaidOut, *, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x @ w.T over the last axis of x, accumulated in f32.

    Args:
      x: activations [..., K].
      w: weight [N, K]; a plain one is used in its own dtype, one that was laid out for a chip by its kernel, and another quantized
        one is decoded to x's dtype.
      out_dtype: dtype of the result; None gives x's (the head asks for f32).

    Returns:
      [..., N].
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, LaidOut):
        y = laid_out_product(rows, w)
    elif isinstance(w, MXFP4Array):
        decoded = functools.partial(mxfp4_matmul, product=_plain)
        arguments = (_whole_blocks(rows), w.packed, w.scales)
        y = cpu_kernels.on_cpu(cpu_kernels.mxfp4_matmul, decoded, *arguments, dtypes=("bfloat16",))
    elif isinstance(w, MXArray):
        bits = {name: getattr(FORMATS[w.format], name) for name in ("exponent_bits", "mantissa_bits")}
        kernel, decoded = functools.partial(cpu_kernels.mx8_matmul, **bits), functools.partial(mx_matmul, **bits, product=_plain)
        y = cpu_kernels.on_cpu(kernel, decoded, _whole_blocks(rows), w.codes, w.scales, dtypes=("bfloat16",))
    else:
        y = _plain(rows.astype(w.dtype), w)
    return y.reshape(*x.shape[:-1], w.shape[0]).astype(out_dtype or x.dtype)


def implementation(chip: str) -> str:
    """Name what `linear` runs in bfloat16 on a chip (of `pallas_kernels.chip_of`), for plain and for quantized weights."""
    if chip != "cpu":
        kernel = {"tpu": "Pallas TPU kernel", "gpu": "Pallas GPU kernel"}
        mxfp4 = choose(chip, "bfloat16", BLOCK, BLOCK)
        return f"XLA dot; {kernel.get(mxfp4, f'XLA ({mxfp4})')} for mxfp4"
    bf16, mxfp4 = cpu_kernels.isas("matmul"), cpu_kernels.isas("mxfp4_matmul")
    if not bf16:
        return "XLA dot, at least two rows"
    mx8 = cpu_kernels.isas("mx8_matmul")
    return (
        f"C++ for bfloat16 ({bf16[0]}), float16 and float32, for mxfp4 ({mxfp4[0]}, activations in 8 bits) and for the other MX "
        f"formats ({mx8[0]})"
    )


def _plain(x, w):
    return cpu_kernels.on_cpu(cpu_kernels.dense_matmul, bf16_matmul, x, w)


def _whole_blocks(x):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)))
