"""Matrix products in plain jnp: the definition that every kernel is compared with. What is run is in `xla` and the kernels' files.

Notation: M rows of activations, N outputs, K contracted. Weights are [N, K], K last. An MX weight has K a multiple of 32: codes of
E exponent and M mantissa bits, and one scale byte s for each block of 32 along K, read as 2^(s - 127) (OCP Microscaling Formats
v1.0, section 5).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 32  # elements along K that share a scale


def bf16_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T with f32 accumulation and an f32 result.

    Args:
      x: activations [M, K], in the weight's dtype (bfloat16, float16 or float32).
      w: weight [N, K].

    Returns:
      f32 [M, N].
    """
    # Float32 weights are asked for when exactness matters more than speed, so the reduced-precision passes
    # that TPUs and GPUs use by default for f32 products are switched off.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def mxfp4_matmul(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """`mx_matmul` for MXFP4 weights: codes uint8 [N, K/2], scales uint8 [N, K/32]."""
    return mx_matmul(x, codes, scales, 2, 1)


def mx_matmul(x: jax.Array, codes: jax.Array, scales: jax.Array, exponent_bits: int, mantissa_bits: int) -> jax.Array:
    """x @ mx_decode(codes, scales).T in x's dtype, with f32 accumulation and an f32 result.

    Args:
      x: activations [M, K], bfloat16, float16 or float32.
      codes: uint8 [N, K * bits / 8], as `unpacked` reads them.
      scales: uint8 [N, K/32].
      exponent_bits: of an element.
      mantissa_bits: of an element.

    Returns:
      f32 [M, N].

    Raises:
      ValueError: the shapes do not belong together.
    """
    check_shapes(x, codes, scales, exponent_bits, mantissa_bits)
    return bf16_matmul(x, mx_decode(codes, scales, exponent_bits, mantissa_bits).astype(x.dtype))


def mx_decode(codes: jax.Array, scales: jax.Array, exponent_bits: int, mantissa_bits: int) -> jax.Array:
    """Return the values of an MX weight, which bfloat16 holds exactly.

    A scale byte of 0 is read as scale 0, and values below 2^-126, the least normal number, are zero. Every code is read as a finite
    number: those that FP8 sets aside for infinity and NaN never stand for a weight.

    Args:
      codes: uint8 [N, K * bits / 8], as `unpacked` reads them.
      scales: uint8 [N, K/32].
      exponent_bits: of an element; its exponent bias is 2^(exponent_bits - 1) - 1.
      mantissa_bits: of an element.

    Returns:
      bfloat16 [N, K].
    """
    # Integers that build the bits of a bfloat16: on XLA:CPU the fastest form of those tried (a table, a cast from
    # float4_e2m1fn, f32 arithmetic), and free of the platform's ways with subnormal numbers.
    n, blocks = scales.shape
    bias = 2 ** (exponent_bits - 1) - 1
    codes = unpacked(codes, 1 + exponent_bits + mantissa_bits).reshape(n, blocks, BLOCK)
    scales = scales[:, :, None].astype(jnp.int32)
    magnitude = codes & (1 << exponent_bits + mantissa_bits) - 1
    bits = magnitude << 7 - mantissa_bits  # a bfloat16 has 7 bits of mantissa
    for h in reversed(range(mantissa_bits)):  # subnormal elements whose highest set bit is bit h: shift it out of the mantissa
        bits = jnp.where(magnitude < 2 << h, (magnitude << 7 - h) + (h - mantissa_bits << 7), bits)
    bits = jnp.clip(bits + (scales - bias << 7), 0, 0x7F80)  # 0x7F80 is infinity
    bits = jnp.where((magnitude == 0) | (scales == 0) | (bits < 0x80), 0, bits)
    bits |= codes >> exponent_bits + mantissa_bits << 15
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16).reshape(n, blocks * BLOCK)


def decode(arrays: Mapping[str, jax.Array], format: Any, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    """Return the values [N, K32] of a weight in any format, K32 a multiple of 32, as `dtype`; those of MX formats are bfloat16's.

    Args:
      arrays: "codes", "scales" and, where the format has them, "minima" of the weight as it is stored.
      format: `weights.formats.Format`: element, group, scale, minimum, rows.
      dtype: of the result, which is rounded once.
    """
    if format.scale == "e8m0":
        bits = (format.element.exponent_bits, format.element.mantissa_bits)
        return mx_decode(arrays["codes"], arrays["scales"], *bits).astype(dtype)
    codes = unpacked(arrays["codes"], format.bits)
    n, k = codes.shape
    group = format.group or k
    codes = jnp.pad(codes, ((0, -n % format.rows), (0, -k % group)))
    codes = codes.reshape(-1, format.rows, codes.shape[1] // group, group)
    minima = arrays.get("minima")
    values = group_values(codes, arrays["scales"][:, None], None if minima is None else minima[:, None], format)
    return values.reshape(codes.shape[0] * codes.shape[1], -1)[:n, :k].astype(dtype)


def unpacked(codes: jax.Array, bits: int) -> jax.Array:
    """Return one code an element, int32 [N, K], of codes of 4, 6 or 8 bits as they are stored, uint8 [N, K * bits / 8].

    Element 2i of four bits lies in the low half of byte i. 32 elements of six bits lie in 24 bytes: 16 with their lower four bits,
    element i in the low half of byte i and i + 16 in the high half, and 8 with their upper two, element 8f + i in bits 2f and
    2f + 1 of byte i.
    """
    n, k = codes.shape[0], codes.shape[1] * 8 // bits
    if bits == 6:
        blocks = codes.reshape(n, k // BLOCK, 24)
        lower = blocks[:, :, None, :16] >> jnp.array([[[[0], [4]]]], jnp.uint8) & 15
        upper = blocks[:, :, None, 16:] >> jnp.array([[[[0], [2], [4], [6]]]], jnp.uint8) & 3
        codes = lower.reshape(n, k) | upper.reshape(n, k) << 4
    if bits == 4:
        codes = (codes[:, :, None] >> jnp.array([[[0, 4]]], jnp.uint8) & 15).reshape(n, k)
    return codes.astype(jnp.int32)


def group_values(codes: jax.Array, scales: jax.Array, minima: jax.Array | None, format: Any) -> jax.Array:
    """element(code) * scale + minimum in float32, of int32 codes [..., group] and scales and minima [...] as they are stored."""
    values = code_values(codes, format.element) * number_of_scale(scales, format.scale)[..., None]
    return values if minima is None else values + minima.astype(jnp.float32)[..., None]


def code_values(codes: jax.Array, element: Any) -> jax.Array:
    """Return what codes stand for in float32: an integer's less its offset, a small float's own value."""
    if hasattr(element, "offset"):
        return (codes - element.offset).astype(jnp.float32)
    return element_values(codes, element.exponent_bits, element.mantissa_bits)


def element_values(codes: jax.Array, exponent_bits: int, mantissa_bits: int) -> jax.Array:
    """Return what int32 codes of a small float stand for in float32; those that FP8 sets aside for infinity and NaN are finite."""
    magnitude = codes & (1 << exponent_bits + mantissa_bits) - 1
    bias, one = 2 ** (exponent_bits - 1) - 1, 1 << mantissa_bits
    subnormal = magnitude < one
    bits = (magnitude + jnp.where(subnormal, one, 0) << 23 - mantissa_bits) + (127 - bias << 23)
    # Subnormal codes get an implicit one, which is subtracted again.
    values = jax.lax.bitcast_convert_type(bits, jnp.float32) - jnp.where(subnormal, jnp.float32(2.0 ** (1 - bias)), jnp.float32(0))
    return jnp.where(codes >> exponent_bits + mantissa_bits & 1 == 1, -values, values)


def number_of_scale(scales: jax.Array, kind: str) -> jax.Array:
    """Return scales as float32, from how a format stores them: "e4m3" (its bits in a byte), "float16" or "float32"."""
    return element_values(scales.astype(jnp.int32), 4, 3) if kind == "e4m3" else scales.astype(jnp.float32)


def whole_blocks(x: jax.Array) -> jax.Array:
    """Fill x [M, K] up with zeros to whole MX blocks along K."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)))


def check_decoded_shapes(x: jax.Array, arrays: Mapping[str, jax.Array], format: Any) -> None:
    """Raise a ValueError unless activations and the arrays of a stored weight belong together."""
    n, k = arrays["codes"].shape[0], x.shape[1]
    groups = (-(-n // format.rows), -(-k // (format.group or k)))
    wanted = {"codes": (n, k * format.bits // 8), "scales": groups}
    wanted |= {"minima": groups} if format.minimum else {}
    found = {role: array.shape for role, array in arrays.items()}
    if found != wanted or k % BLOCK:
        given, needed = (", ".join(f"{role} {list(shape)}" for role, shape in shapes.items()) for shapes in (found, wanted))
        raise ValueError(
            f"x {list(x.shape)} does not belong to a {format.name} weight of {given}; "
            f"give x [M, K], K a multiple of {BLOCK}, and {needed}"
        )


def check_shapes(x: jax.Array, codes: jax.Array, scales: jax.Array, exponent_bits: int, mantissa_bits: int) -> None:
    """Raise a ValueError unless activations and the arrays of an MX weight belong together."""
    bits = 1 + exponent_bits + mantissa_bits
    width = {4: "K/2", 6: "3K/4", 8: "K"}[bits]
    n, blocks = scales.shape
    if codes.shape != (n, blocks * BLOCK * bits // 8) or x.shape[1:] != (blocks * BLOCK,):
        raise ValueError(
            f"x {list(x.shape)}, codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together; "
            f"give x [M, K], codes [N, {width}] and scales [N, K/{BLOCK}], with K padded to whole blocks"
        )
