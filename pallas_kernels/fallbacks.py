"""MXFP4 products in XLA alone that leave the weight packed in memory, for chips on which Pallas does not compile.

Notation: M rows of activations, N outputs, K contracted, G = K/32 MX blocks (the elements that share a scale).
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.product import STORED_AXES, Product, as_stored
from pallas_kernels.reference import BLOCK, whole_blocks
from pallas_kernels.xla import decoded_matmul

ROWS = 16  # up to this many; with more, a decoded weight costs less than decoding for every row


def arrange_groups(
    codes: jax.Array, scales: jax.Array, along_n: int = 1, along_k: int = 1, format: Any = None
) -> dict[str, jax.Array]:
    """Return an MXFP4 weight as `grouped_matmul` reads it: K before N, element i of an MX block beside element i + 16.

    Args:
      codes: uint8 [N, K/2], element 2i in the low half of byte i.
      scales: uint8 [N, K/32].
      along_n, along_k: number of equal parts of N and K that will lie on different devices, which change nothing.

    Returns:
      codes: uint8 [G, 16, N], element i in the low half of byte i, i + 16 in the high half; scales: uint8 [G, N].
    """
    n, groups = scales.shape
    codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(n, groups, 2, 16)
    return {"codes": jnp.transpose(codes[:, :, 0] | codes[:, :, 1] << 4, (1, 2, 0)), "scales": scales.T}


def grouped_matmul(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """x @ w.T, one product an MX block and then the sum of all, scaled: what XLA:TPU fuses with the decoding.

    Args:
      x: [M, K], bfloat16, float16 or float32.
      codes: uint8 [G, 16, N] of `arrange_groups`.
      scales: uint8 [G, N].

    Returns:
      f32 [M, N].
    """
    m, groups = x.shape[0], codes.shape[0]
    x = x.reshape(m, groups, 2, 16)
    halves = [_values(codes >> 4 * i & 15).astype(x.dtype) for i in (0, 1)]
    if m > ROWS:
        weight = jnp.stack(halves, 1).astype(jnp.float32) * _scales(scales)[:, None, None]  # [G, 2, 16, N]
        return _einsum("mk,kn->mn", x.reshape(m, -1), weight.reshape(32 * groups, -1).astype(x.dtype))
    sums = sum(_einsum("mgk,gkn->gmn", x[:, :, i], half) for i, half in enumerate(halves))
    return jnp.sum(sums * _scales(scales)[:, None], axis=0)


def reduced_matmul(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """x @ w.T as a sum of f32 products: one reduction that XLA:GPU fuses with the decoding.

    Args:
      x: [M, K], bfloat16, float16 or float32, M up to 16.
      codes: uint8 [N, K/2], element 2i in the low half of byte i.
      scales: uint8 [N, K/32].

    Returns:
      f32 [M, N].
    """
    n, groups = scales.shape
    # XLA:GPU reads this type two to a byte; decoded by shifts, several rows would be kept as a weight in memory.
    weight = jax.lax.bitcast_convert_type(codes, jnp.float4_e2m1fn).astype(jnp.float32).reshape(n, groups, BLOCK)
    weight = (weight * _scales(scales)[:, :, None]).reshape(n, -1)
    return jnp.sum(x.astype(jnp.float32)[:, None] * weight[None], axis=-1)


def _einsum(subscripts, x, w):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, w, precision=precision, preferred_element_type=jnp.float32)


def _values(codes):
    """E2M1 codes as f32: 1 is 0.5, from 2 on exponent and mantissa follow each other."""
    codes = codes.astype(jnp.int32)
    magnitude = codes & 7
    bits = jnp.where(magnitude < 2, magnitude * 0x3F00, 0x3F00 + (magnitude << 6)) | codes >> 3 << 15
    return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)


def _scales(scales):
    # A float32 whose exponent is the byte; the byte 0 is the number 0.
    return jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)


def _on_a_tpu(chip, dtype, n, k, along_n, along_k):
    return None if chip.startswith("TPU") else "is made for TPUs; use 'decoded'"


def _on_nvidia(chip, dtype, n, k, along_n, along_k):
    return None if chip.startswith("sm_") else "is made for NVIDIA GPUs; use 'decoded'"


def _run_grouped(x, arrays, *, n, chip, format, interpret, used=None):
    return grouped_matmul(whole_blocks(x), **arrays)


def _run_reduced(x, arrays, *, n, chip, format, interpret, used=None):
    x = whole_blocks(x)
    return reduced_matmul(x, **arrays) if x.shape[0] <= ROWS else decoded_matmul(x, arrays, format)


def row_multiple(chip: str, dtype: str) -> int:
    """The most rows for which both multiply codes, not a decoded weight."""
    return ROWS


GROUPED_AXES = {"codes": ("k", None, "n"), "scales": ("k", "n")}
GROUPED = Product("grouped", ("mxfp4",), _on_a_tpu, arrange_groups, GROUPED_AXES, _run_grouped, row_multiple)
REDUCED = Product("reduced", ("mxfp4",), _on_nvidia, as_stored, STORED_AXES, _run_reduced, row_multiple)
