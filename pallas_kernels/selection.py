"""Which product multiplies an MXFP4 weight on which chip, and how it wants the weight laid out.

A product's name and a chip's name are strings: `chip_of(device)` is a TPU's device kind ("TPU v5 lite"), an NVIDIA GPU's compute
capability ("sm_90"), or the platform ("cpu"). Support is a function of names, dtypes and shapes alone. Notation: M rows of
activations, N outputs, K contracted.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import fallbacks, gpu, tpu
from pallas_kernels.reference import BLOCK, mxfp4_matmul

PALLAS_TPUS = ("TPU v5 lite", "TPU v5", "TPU v5p", "TPU v5e", "TPU v6 lite", "TPU v6e", "TPU7x")
MOST_K = 2**17  # a TPU kernel keeps the activations of all of K on the chip

# Which dimensions of the weight those of its arrays are. The best product first: `choose` takes the first that is supported.
LAYOUTS = {
    "tpu": (("k", None, "n"), ("k", None, "n")),
    "tpu without subnormals": (("k", None, "n"), ("k", None, "n")),
    "gpu": (("k", "n", None), ("k", "n"), ("n",)),
    "grouped": (("k", None, "n"), ("k", "n")),
    "reduced": (("n", "k"), ("n", "k")),
    "decoded": (("n", "k"), ("n", "k")),
}


def chip_of(device: jax.Device) -> str:
    """Return what decides which products a device supports."""
    if device.platform == "gpu" and "." in getattr(device, "compute_capability", ""):
        return "sm_" + device.compute_capability.replace(".", "")
    return device.device_kind if device.platform == "tpu" else device.platform


def unsupported(name: str, chip: str, dtype: str, n: int, k: int, along_n: int = 1, along_k: int = 1) -> str | None:
    """Return why a product cannot be had, in one sentence, or None if it can.

    Args:
      name: a key of `LAYOUTS`.
      chip: of `chip_of`.
      dtype: of the activations.
      n, k: of the weight.
      along_n, along_k: over how many devices the weight is split along N and along K.
    """
    asked = f"the product '{name}' for {dtype} [M, {k}] and an MXFP4 weight [{n}, {k}] on {chip}"
    if name not in LAYOUTS:
        return f"there is no product '{name}'; give one of {', '.join(LAYOUTS)}"
    if n % along_n:
        return f"{asked} cannot be split over {along_n} devices along N; keep N whole or split it evenly"
    if along_k > 1 and k % (BLOCK * along_k):
        return f"{asked} cannot be split over {along_k} devices along K, since MX blocks of {BLOCK} would be; keep K whole"
    if name.startswith("tpu"):
        if chip not in PALLAS_TPUS:
            return f"{asked} needs a TPU v5e, v5p, v6e or 7x; use 'grouped'"
        if k // along_k > MOST_K:
            return f"{asked} takes K up to {MOST_K} on a device; use 'grouped'"
        return None if dtype == "bfloat16" else f"{asked} takes bfloat16 alone; use 'grouped'"
    if name == "gpu":
        if not _is_ampere_or_later(chip):
            return f"{asked} needs an NVIDIA GPU of compute capability 8.0 or more; use 'reduced'"
        return None if dtype in ("bfloat16", "float16") else f"{asked} takes bfloat16 and float16; use 'reduced'"
    return None


def choose(chip: str, dtype: str, n: int, k: int, along_n: int = 1, along_k: int = 1) -> str:
    """Return the name of the best product for a chip; the arguments are those of `unsupported`."""
    preferred = ("tpu", "grouped") if chip.startswith("TPU") else ("gpu", "reduced") if chip.startswith("sm_") else ()
    return next(name for name in (*preferred, "decoded") if unsupported(name, chip, dtype, n, k, along_n, along_k) is None)


def lay_out(name: str, packed: jax.Array, scales: jax.Array, along_n: int = 1, along_k: int = 1) -> tuple[jax.Array, ...]:
    """Return the arrays that a product reads, from uint8 [N, K/2] and uint8 [N, K/32]."""
    if name.startswith("tpu"):
        return tpu.lay_out(packed, scales, along_k)
    if name == "gpu":
        return gpu.lay_out(packed, scales, along_n, along_k)
    return fallbacks.lay_out_groups(packed, scales) if name == "grouped" else (packed, scales)


def laid_out_matmul(name: str, x: jax.Array, arrays: tuple[jax.Array, ...], n: int, chip: str, interpret=False) -> jax.Array:
    """x @ w.T for arrays of `lay_out`, or one device's part of them.

    Args:
      name: the product.
      x: [M, K].
      arrays: of `lay_out`.
      n: the outputs of these arrays, without what they were filled up with.
      chip: of `chip_of`.
      interpret: run a Pallas kernel by an interpreter.

    Returns:
      f32 [M, N].

    Raises:
      NotImplementedError: the product does not take this; one sentence with the shapes.
    """
    reason = unsupported(name, chip, x.dtype.name, n, x.shape[1])
    if reason is not None:
        raise NotImplementedError(reason)
    if name.startswith("tpu"):
        return tpu.mxfp4_matmul(x, *arrays, subnormals=name == "tpu", interpret=interpret)
    if name == "gpu":
        return gpu.mxfp4_matmul(x, *arrays, n=n, chip=chip, interpret=interpret)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)))
    if name == "grouped":
        return fallbacks.grouped_matmul(x, *arrays)
    if name == "reduced" and x.shape[0] <= fallbacks.ROWS:
        return fallbacks.reduced_matmul(x, *arrays)
    return mxfp4_matmul(x, *arrays)


def _is_ampere_or_later(chip: str) -> bool:
    return chip.startswith("sm_") and int(chip[3:]) >= 80
