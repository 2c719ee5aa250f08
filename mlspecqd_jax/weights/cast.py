"""`quantize` and `dequantize`: a weight to a format and back."""

import functools

import jax
import jax.core
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.weights import mx, scaled
from mlspecqd_jax.weights.formats import format_of
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import decode

SEARCH = "mse"
SCALE_RULES = (*mx.SCALE_RULES, SEARCH)
WEIGHT_DTYPES = ("bfloat16", "float16", "float32")


def quantize(w: jax.Array, format: str = "mxfp4", scale_rule: str = "floor") -> QuantizedArray:
    """Cast a weight to a format: each element to the nearest that its group's scale allows.

    Args:
      w: [N, K], bfloat16, float16 or float32, finite.
      format: a name of `formats.FORMATS`.
      scale_rule: how a group's scale comes from what is in it. `floor`: the specification's for MX, for others the largest
        magnitude becomes the largest element (`scaled`). `mse`: of a few scales the one of least squared error. ceil, rceil and
        even: of MX formats alone (`mx.encode`).

    Raises:
      InputError: one sentence on the format, the rule, the shape, the dtype, or (not under jit) a value that is not finite.
    """
    f = format_of(format)
    check_scale_rule(scale_rule, format)
    dtype = str(getattr(w, "dtype", type(w).__name__))
    if dtype not in WEIGHT_DTYPES:
        raise InputError(f"a weight of dtype {dtype} cannot be quantized; cast it to one of {', '.join(WEIGHT_DTYPES)} first")
    shape = list(w.shape)
    if len(shape) != 2:
        raise InputError(f"a weight of shape {shape} cannot be quantized; give a matrix [N, K]")
    arrays, finite = mx.encode(w, f, scale_rule) if f.scale == "e8m0" else scaled.encode(w, f, scale_rule == SEARCH)
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise InputError(f"a weight of shape {shape} holds NaN or infinity and cannot be quantized; use an intact checkpoint")
    return QuantizedArray(arrays, (shape[0], shape[1]), format)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(a: QuantizedArray, dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
    """Return the weight [N, K] that a stored array stands for.

    Of MX formats it is exact in bfloat16 and float32, rounded in float16; a scale byte of 0 is read as scale 0, so that a block
    whose magnitudes are all below about 2^-124 is taken for zero. Of others it is computed in float32 and rounded.
    """
    values = decode(a.core, format_of(a.format), jnp.float32)[:, : a.shape[1]]
    if "tensor_scale" in a.arrays:
        values *= a.arrays["tensor_scale"][:, None]
    if "row_scale" in a.arrays:
        values *= a.arrays["row_scale"][:, None]
    if "order" in a.arrays:
        values = values[:, jnp.argsort(a.arrays["order"])]
    return values.astype(dtype)


def check_scale_rule(scale_rule: str, format: str | None = None) -> None:
    """Raise an InputError unless `scale_rule` is a name of `SCALE_RULES`, and one of this format."""
    if scale_rule not in SCALE_RULES:
        raise InputError(f"'{scale_rule}' is not a scale rule; give one of {', '.join(SCALE_RULES)}")
    if format is not None and scale_rule in mx.SCALE_RULES[1:] and format_of(format).scale != "e8m0":
        raise InputError(f"the scale rule '{scale_rule}' is of MX formats alone, and {format} is none; give 'floor' or '{SEARCH}'")
