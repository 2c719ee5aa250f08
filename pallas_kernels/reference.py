"""Matrix products in plain jnp: the definition that every kernel is compared with. What is run is in `xla` and the kernels' files.

Notation: M rows of activations, N outputs, K contracted. Weights are [N, K], K last. An MX weight has K a multiple of 32: codes of
E exponent and M mantissa bits, and one scale byte s for each block of 32 along K, read as 2^(s - 127) (OCP Microscaling Formats
v1.0, section 5).
"""

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
      codes: uint8 [N, K], or [N, K/2] for elements of four bits, two to a byte.
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
      codes: uint8 [N, K], or [N, K/2] for elements of four bits: element 2i in the low half of byte i.
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
    if exponent_bits + mantissa_bits == 3:
        codes = codes[:, :, None] >> jnp.array([[[0, 4]]], jnp.uint8) & 15  # [N, K/2, 2]
    codes = codes.reshape(n, blocks, BLOCK).astype(jnp.int32)
    scales = scales[:, :, None].astype(jnp.int32)
    magnitude = codes & (1 << exponent_bits + mantissa_bits) - 1
    bits = magnitude << 7 - mantissa_bits  # a bfloat16 has 7 bits of mantissa
    for h in reversed(range(mantissa_bits)):  # subnormal elements whose highest set bit is bit h: shift it out of the mantissa
        bits = jnp.where(magnitude < 2 << h, (magnitude << 7 - h) + (h - mantissa_bits << 7), bits)
    bits = jnp.clip(bits + (scales - bias << 7), 0, 0x7F80)  # 0x7F80 is infinity
    bits = jnp.where((magnitude == 0) | (scales == 0) | (bits < 0x80), 0, bits)
    bits |= codes >> exponent_bits + mantissa_bits << 15
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16).reshape(n, blocks * BLOCK)


def whole_blocks(x: jax.Array) -> jax.Array:
    """Fill x [M, K] up with zeros to whole MX blocks along K."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)))


def check_shapes(x: jax.Array, codes: jax.Array, scales: jax.Array, exponent_bits: int, mantissa_bits: int) -> None:
    """Raise a ValueError unless activations and the arrays of an MX weight belong together."""
    per_byte = 2 if exponent_bits + mantissa_bits == 3 else 1
    n, blocks = scales.shape
    if codes.shape != (n, blocks * BLOCK // per_byte) or x.shape[1:] != (blocks * BLOCK,):
        raise ValueError(
            f"x {list(x.shape)}, codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together; "
            f"give x [M, K], codes [N, K{'/2' if per_byte == 2 else ''}] and scales [N, K/{BLOCK}], with K padded to whole blocks"
        )
