"""The cast to MXFP4 and the other MX formats: small floating-point elements that share a power-of-two scale in blocks of 32.

Source: OCP Microscaling Formats (MX) v1.0, section 6.3 (conversion). Weights are [N, K] with the blocks along K; K32 is K rounded
up to whole blocks, the rest being zero elements. A scale is stored as its biased exponent (E8M0): byte s is 2^(s - 127).

Everything is exact integer arithmetic on the bits of float32, or float32 arithmetic on numbers that are not subnormal, so that
platforms that flush subnormal numbers give the same codes.
"""

import functools

import jax
import jax.numpy as jnp

from mlspecqd_jax.weights.formats import STEP, Element, Format
from pallas_kernels import element_values

SCALE_RULES = ("floor", "ceil", "rceil", "even")


@functools.partial(jax.jit, static_argnames=("f", "scale_rule"))
def encode(w: jax.Array, f: Format, scale_rule: str) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return (the arrays of `QuantizedArray` by role; whether every value of w [N, K] is finite).

    Elements are w / 2^e rounded to nearest, ties to even, and saturating (section 6.3). The exponent e of a block comes from its
    largest magnitude amax by the scale rule: `floor` (the specification's) is floor(log2(amax)) - emax; `ceil` is one more unless
    amax is a power of two; `rceil` is the least e at which nothing saturates, amax <= largest * 2^e; `even` is `floor` of amax
    rounded to the element's mantissa bits; `mse` is of `floor`, one less and one more the one of least squared error. Exponents
    below -127 become -127.
    """
    group = f.group
    assert isinstance(f.element, Element), "no format of integers has such scales"
    assert group is not None, "a whole row shares none"
    n, k = w.shape
    blocks = jnp.pad(w.astype(jnp.float32), ((0, 0), (0, -k % group))).reshape(n, -1, group)
    scale = block_scales(blocks, f, scale_rule)  # [N, K32 / 32, 1]
    codes = block_codes(blocks, scale, f).reshape(n, -1)
    return {"codes": stored_codes(codes, f), "scales": scale[:, :, 0].astype(jnp.uint8)}, jnp.all(jnp.isfinite(w))


def block_scales(blocks: jax.Array, f: Format, scale_rule: str, weights: jax.Array | None = None) -> jax.Array:
    """Return the scale bytes, int32 [..., 1], of blocks f32 [..., 32], by a rule of `encode`.

    The squares of a search weigh 1, or, of blocks [N, 32], so much, f32 [32].
    """
    element = f.element
    assert isinstance(element, Element)
    magnitude = _bits(blocks) & 0x7FFFFFFF  # ordered as the magnitudes themselves, subnormal ones too
    amax = jnp.max(magnitude, axis=-1, keepdims=True)
    scale = _scale(amax, element, "floor" if scale_rule == "mse" else scale_rule)
    return _best(magnitude, scale, element, weights) if scale_rule == "mse" else scale


def block_codes(values: jax.Array, scale: jax.Array, f: Format) -> jax.Array:
    """Return codes, int32, of float32 values divided by the scales that these bytes, int32, stand for."""
    assert isinstance(f.element, Element)
    bits = _bits(values)
    return _element(bits & 0x7FFFFFFF, scale, f.element) | (bits < 0).astype(jnp.int32) << f.bits - 1


def block_values(codes: jax.Array, scale: jax.Array, f: Format) -> jax.Array:
    """Return what codes, int32, and scale bytes, int32, stand for in float32."""
    assert isinstance(f.element, Element)
    return element_values(codes, f.element.exponent_bits, f.element.mantissa_bits) * _power_of_two(jnp.maximum(scale - 127, -126))


def _bits(values):
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def _scale(amax, f: Element, scale_rule: str):
    """Scale bytes, int32, of blocks whose largest magnitudes have these float32 bits: `floor`'s, plus one from a mantissa on."""
    raised_from = {
        "floor": 1 << 23,  # never: a mantissa has 23 bits
        "ceil": 1,
        "rceil": int((f.largest / 2**f.emax - 1) * 2**23) + 1,  # the first that the largest value does not reach
        "even": (1 << 23) - (1 << 22 - f.mantissa_bits),  # the first that rounds up to the next power of two
    }[scale_rule]
    raised = (amax & 0x7FFFFF) >= raised_from
    # At most 254 - 2 + 1, so only the lower end of E8M0 is ever met; subnormal amax and zero are below it.
    return jnp.maximum((amax >> 23) - f.emax + raised.astype(jnp.int32), 0)


def _best(magnitude, scale, f: Element, weights):
    """Of a scale byte, one less and one more, the one of least squared error; of equal ones the first."""
    w = jax.lax.bitcast_convert_type(magnitude, jnp.float32)
    candidates = jnp.stack([scale, jnp.clip(scale - 1, 0, 254), jnp.clip(scale + 1, 0, 254)])

    def error(scale):
        codes = _element(magnitude, scale, f)
        values = element_values(codes, f.exponent_bits, f.mantissa_bits) * _power_of_two(jnp.maximum(scale - 127, -126))
        squares = (values - w) ** 2
        return jnp.sum(squares if weights is None else squares * weights[None], axis=-1, keepdims=True)

    best = jnp.argmin(jax.lax.map(error, candidates), axis=0)[None]
    return jnp.take_along_axis(candidates, best, axis=0)[0]


def stored_codes(codes: jax.Array, f: Format) -> jax.Array:
    """Return int32 codes [N, K32] as they are stored (`formats`), uint8 [N, K32 * bits / 8]."""
    n, k = codes.shape
    # As one sum each: XLA:CPU takes five times as long and more to join what lies in different places.
    if f.bits == 4:
        codes = jnp.sum(codes.reshape(n, k // 2, 2) << jnp.array([[[0, 4]]]), axis=2)
    elif f.bits == 6:
        codes = codes.reshape(n, k // STEP, 4, 1, 8)
        # Of four times eight elements, and of three times eight bytes: which.
        elements, word = jnp.arange(4).reshape(1, 1, 4, 1, 1), jnp.arange(3).reshape(1, 1, 1, 3, 1)
        lower = jnp.where(word == elements % 2, (codes & 15) << elements // 2 * 4, 0)
        codes = jnp.sum(jnp.where(word == 2, codes >> 4 << elements * 2, lower), axis=2).reshape(n, f.code_bytes(k))
    return codes.astype(jnp.uint8)


def element_codes(values: jax.Array, f: Element) -> jax.Array:
    """Return the codes, int32, of float32 values rounded to a small float: to nearest, ties to even, and saturating."""
    bits = _bits(values)
    return _element(bits & 0x7FFFFFFF, jnp.int32(127), f) | (bits < 0).astype(jnp.int32) << f.bits - 1


def _element(magnitude, scale, f: Element):
    """Codes, int32 without sign, of float32 magnitudes, given by their bits, divided by their block's scale."""
    exponent = magnitude >> 23
    significand = jnp.where(exponent > 0, magnitude & 0x7FFFFF | 0x800000, magnitude)  # |w| = significand * 2^(exponent - 150)
    exponent = jnp.maximum(exponent, 1)
    # An exponent that is cut off at -126 belongs to a value below 2^-102, which is zero in every format either way.
    value = significand.astype(jnp.float32) * _power_of_two(jnp.maximum(exponent - 23 - scale, -126))
    exponent = jnp.maximum((jax.lax.bitcast_convert_type(value, jnp.int32) >> 23) - 127, 1 - f.bias)
    steps = jnp.rint(value * _power_of_two(f.mantissa_bits - exponent)).astype(jnp.int32)
    # Steps count from the exponent's own zero, so a value that rounds up to the next power of two carries into the exponent.
    codes = (exponent + f.bias - 1 << f.mantissa_bits) + steps
    largest = (f.emax + f.bias - 1 << f.mantissa_bits) + int(f.largest / 2.0 ** (f.emax - f.mantissa_bits))
    return jnp.minimum(codes, largest)


def _power_of_two(exponent):
    return jax.lax.bitcast_convert_type(exponent + 127 << 23, jnp.float32)
