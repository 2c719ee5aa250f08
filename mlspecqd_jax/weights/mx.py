"""The cast to MXFP4 and the other MX formats: small floating-point elements that share a power-of-two scale in blocks of 32.

Source: OCP Microscaling Formats (MX) v1.0, section 6.3 (conversion). Weights are [N, K] with the blocks along K; K32 is K rounded
up to whole blocks, the rest being zero elements. A scale is stored as its biased exponent (E8M0): byte s is 2^(s - 127).

Everything is exact integer arithmetic on the bits of float32, or float32 arithmetic on numbers that are not subnormal, so that
platforms that flush subnormal numbers give the same codes.
"""

import functools

import jax
import jax.core
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.weights.formats import FORMATS, Element, Format, check_format
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import mx_decode

SCALE_RULES = ("floor", "ceil", "rceil", "even")
WEIGHT_DTYPES = ("bfloat16", "float16", "float32")


def quantize(w: jax.Array, format: str = "mxfp4", scale_rule: str = "floor") -> QuantizedArray:
    """Cast a weight to an MX format: elements w / 2^e rounded to nearest, ties to even, and saturating (section 6.3).

    The exponent e of a block comes from its largest magnitude amax by the scale rule: `floor` (the specification's) is
    floor(log2(amax)) - emax; `ceil` is one more unless amax is a power of two; `rceil` is the least e at which nothing saturates,
    amax <= largest * 2^e; `even` is `floor` of amax rounded to the element's mantissa bits. Exponents below -127 become -127.

    Args:
      w: [N, K], bfloat16, float16 or float32, finite.
      format: a name of `FORMATS`.
      scale_rule: a name of `SCALE_RULES`.

    Raises:
      InputError: one sentence on the format, the rule, the shape, the dtype, or (not under jit) a value that is not finite.
    """
    check_format(format)
    check_scale_rule(scale_rule)
    dtype = str(getattr(w, "dtype", type(w).__name__))
    if dtype not in WEIGHT_DTYPES:
        raise InputError(f"a weight of dtype {dtype} cannot be quantized; cast it to one of {', '.join(WEIGHT_DTYPES)} first")
    shape = list(w.shape)
    if len(shape) != 2:
        raise InputError(f"a weight of shape {shape} cannot be quantized; give a matrix [N, K]")
    codes, scales, finite = _encode(w, FORMATS[format], scale_rule)
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise InputError(f"a weight of shape {shape} holds NaN or infinity and cannot be quantized; use an intact checkpoint")
    return QuantizedArray({"codes": codes, "scales": scales}, (shape[0], shape[1]), format)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(a: QuantizedArray, dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
    """Return the weight [N, K] that a stored array stands for: exact in bfloat16 and float32, rounded in float16.

    A scale byte of 0 is read as scale 0: a block whose magnitudes are all below about 2^-124 is taken for zero.
    """
    element = FORMATS[a.format].element
    values = mx_decode(**a.arrays, exponent_bits=element.exponent_bits, mantissa_bits=element.mantissa_bits)  # [N, K32]
    return values[:, : a.shape[1]].astype(dtype)


def check_scale_rule(scale_rule: str) -> None:
    """Raise an InputError unless `scale_rule` is a name of `SCALE_RULES`."""
    if scale_rule not in SCALE_RULES:
        raise InputError(f"'{scale_rule}' is not a scale rule; give one of {', '.join(SCALE_RULES)}")


@functools.partial(jax.jit, static_argnames=("f", "scale_rule"))
def _encode(w, f: Format, scale_rule: str):
    """Return (codes [N, K32 / codes_per_byte]; scales [N, K32 / 32]; whether every value is finite)."""
    n, k = w.shape
    w = jnp.pad(w.astype(jnp.float32), ((0, 0), (0, -k % f.group))).reshape(n, -1, f.group)
    bits = jax.lax.bitcast_convert_type(w, jnp.int32)
    magnitude = bits & 0x7FFFFFFF  # ordered as the magnitudes themselves, subnormal ones too
    amax = jnp.max(magnitude, axis=2, keepdims=True)  # [N, K32 / 32, 1]
    scale = _scale(amax, f.element, scale_rule)
    codes = _element(magnitude, scale, f.element) | (bits < 0).astype(jnp.int32) << f.bits - 1
    codes = codes.reshape(n, -1)
    if f.codes_per_byte == 2:  # as a sum: XLA:CPU takes ten times as long to join two strided slices
        codes = jnp.sum(codes.reshape(n, -1, 2) << jnp.array([[[0, 4]]]), axis=2)
    return codes.astype(jnp.uint8), scale[:, :, 0].astype(jnp.uint8), jnp.all(amax < 0x7F800000)


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
