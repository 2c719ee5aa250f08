"""The products of weights in C++ as JAX functions, on CPU alone.

A weight of several experts is theirs one after another, [E * N, K]: then `experts`, int32 [M], says by whose a row is multiplied,
and `n` how many outputs each has (see `cpu_kernels.used`).

Notation: M rows of activations, N outputs, K contracted. Weights are [N, K], K last.
"""

import functools

import jax
import jax.numpy as jnp

from cpu_kernels.library import DTYPES, call
from cpu_kernels.used import experts_of_rows, used_of_rows

ELEMENTS = ("e4m3", "e5m2")  # of mx8_matmul: exponent and mantissa bits
SIX_BITS = {2: "e2m3", 3: "e3m2"}  # of mxfp6_matmul, by exponent bits


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 5))
def dense_matmul(
    x: jax.Array,
    w: jax.Array,
    isa: str | None = None,
    used: jax.Array | None = None,
    experts: jax.Array | None = None,
    n: int | None = None,
) -> jax.Array:
    """x @ w.T with f32 accumulation; each row of the result is bit for bit the same whatever M, N and the number of threads.

    Args:
      x: [M, K], bfloat16, float16 or float32.
      w: [N, K], in x's dtype.
      isa: one of `isas("matmul", dtype)`; None is the first.
      used: int32 [B], rows of each window (see `cpu_kernels.used`). The derivative is that of all rows.
      experts, n: of a weight of several experts; there is no derivative then.

    Returns:
      f32 [M, N].
    """
    if x.dtype != w.dtype or x.dtype.name not in DTYPES or x.ndim != 2 or x.shape[1:] != w.shape[1:]:
        raise ValueError(
            f"x {x.dtype}{list(x.shape)} and w {w.dtype}{list(w.shape)} should be [M, K] and [N, K] of one of {', '.join(DTYPES)}"
        )
    return _call_on_rows("matmul", isa, used, experts, n or len(w), x, w)


@dense_matmul.defjvp
def _(isa, n, primals, tangents):
    (x, w, _, experts), (dx, dw, *_) = primals, tangents
    if experts is not None:
        raise NotImplementedError("the product with several experts' weights has no derivative of its own")

    def plain(x, w):
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)

    return dense_matmul(x, w, isa), plain(dx, w) + plain(x, dw)


def mxfp4_matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    isa: str | None = None,
    used: jax.Array | None = None,
    experts: jax.Array | None = None,
    n: int | None = None,
) -> jax.Array:
    """x @ decoded.T with each block of x rounded to eight bits: q = round(127 x / a) and x taken for q a / 127, a = max |block|.

    Sums over a block are exact, and added in f32. Rows do not depend on M, N and the number of threads. A row of x with a NaN or
    an infinity gives a row of NaN, and blocks below 2^-120 count as zero.

    Args:
      x: bfloat16 [M, K], K a multiple of 32.
      packed: uint8 [N, K/2], element 2i in the low half of byte i.
      scales: uint8 [N, K/32]; byte s is 2^(s - 127), and 0 is read as scale 0.
      isa: one of `isas("mxfp4_matmul")`; None is the first.
      used: int32 [B], rows of each window (see `cpu_kernels.used`).
      experts, n: of a weight of several experts.

    Returns:
      f32 [M, N].
    """
    dtypes = tuple(str(array.dtype) for array in (x, packed, scales))
    if dtypes != ("bfloat16", "uint8", "uint8"):
        raise ValueError(f"x, packed and scales are {', '.join(dtypes)}, but should be bfloat16, uint8, uint8")
    k, rows = x.shape[-1], packed.shape[0]
    if k % 32 or x.ndim != 2 or packed.shape != (rows, k // 2) or scales.shape != (rows, k // 32):
        raise ValueError(
            f"x {list(x.shape)}, packed {list(packed.shape)} and scales {list(scales.shape)} do not belong together; "
            "give x [M, K], packed [N, K/2] and scales [N, K/32], with K padded to whole blocks"
        )
    return _call_on_rows("mxfp4_matmul", isa, used, experts, n or rows, x, packed, scales)


def mxfp6_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    exponent_bits: int,
    isa: str | None = None,
    used: jax.Array | None = None,
    experts: jax.Array | None = None,
    n: int | None = None,
) -> jax.Array:
    """x @ decoded.T for a weight in MXFP6, with x rounded and sums added as `mxfp4_matmul` does.

    Args:
      x: bfloat16 [M, K], K a multiple of 32.
      codes: uint8 [N, 3K/4]: of each 32 elements 24 bytes. 16 hold the lower four bits of the codes, element i in the low half of
        byte i and i + 16 in the high half; 8 their upper two bits, element 8f + i in bits 2f and 2f + 1 of byte i.
      scales: uint8 [N, K/32]; byte s is 2^(s - 127), and 0 is read as scale 0.
      exponent_bits: of an element: 2 with three bits of mantissa, or 3 with two.
      isa: one of `isas("mxfp6_matmul")`; None is the first.
      used: int32 [B], rows of each window (see `cpu_kernels.used`).
      experts, n: of a weight of several experts.

    Returns:
      f32 [M, N].
    """
    dtypes = tuple(str(array.dtype) for array in (x, codes, scales))
    if dtypes != ("bfloat16", "uint8", "uint8"):
        raise ValueError(f"x, codes and scales are {', '.join(dtypes)}, but should be bfloat16, uint8, uint8")
    if exponent_bits not in SIX_BITS:
        raise ValueError(f"elements have {exponent_bits} bits of exponent, but should have 2 or 3")
    k, rows = x.shape[-1], codes.shape[0]
    if k % 32 or x.ndim != 2 or codes.shape != (rows, k * 6 // 8) or scales.shape != (rows, k // 32):
        raise ValueError(
            f"x {list(x.shape)}, codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together; "
            "give x [M, K], codes [N, 3K/4] and scales [N, K/32], with K padded to whole blocks"
        )
    elements = SIX_BITS[exponent_bits]
    return _call_on_rows("mxfp6_matmul", isa, used, experts, n or rows, x, codes, scales, elements=elements)


def grouped_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    minima: jax.Array | None = None,
    isa: str | None = None,
    used: jax.Array | None = None,
    experts: jax.Array | None = None,
    n: int | None = None,
    *,
    bits: int = 4,
) -> jax.Array:
    """x @ decoded.T for a weight whose scales are numbers, with each block of x rounded to eight bits as `mxfp4_matmul` does.

    What the weight is, is told by its arrays: NVFP4 has scales of bytes, integers in groups have float16 scales, and those without
    an offset minima too; integers of eight bits in whole rows have float32 scales. Rows do not depend on M, N and the number of
    threads.

    Args:
      x: bfloat16 [M, K], K a multiple of 32.
      codes: uint8 [N, K/2], element 2i in the low half of byte i, or [N, K] of integers of eight bits, plus 128.
      scales: uint8 [N, K/16], the bits of an E4M3 that is not negative, for each 16 elements; float16 [N, G], one for each 32, 64,
        128 or so on (of eight bits from 16 on), the last group possibly shorter, of integers plus 8 or 128; float32 [N, 1].
      minima: float16 [N, G], of integers without an offset.
      isa: one of `isas(...)` of the product, a name of `library.OF_NUMBERS`; None is the first.
      used: int32 [B], rows of each window (see `cpu_kernels.used`).
      experts, n: of a weight of several experts.
      bits: of a code, 4 or 8, if scales are float16.

    Returns:
      f32 [M, N].
    """
    of_groups = {4: ("int4", "uint4"), 8: ("int8_groups", "uint8")}[bits][minima is not None]
    product = {"uint8": "nvfp4", "float16": of_groups, "float32": "int8"}[scales.dtype.name]
    bits, rows, k = {"nvfp4": 4, "int8": 8}.get(product, bits), len(codes), x.shape[-1]
    groups = {"nvfp4": k // 16, "int8": 1}.get(product, scales.shape[-1])
    fits = x.ndim == 2 and k % 32 == 0 and codes.shape == (rows, k * bits // 8) and scales.shape == (rows, groups)
    fits = fits and (x.dtype, codes.dtype) == (jnp.bfloat16, jnp.uint8)
    if not fits or (minima is not None and (minima.shape, minima.dtype) != (scales.shape, jnp.float16)):
        arrays = {"x": x, "codes": codes, "scales": scales} | ({} if minima is None else {"minima": minima})
        given = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
        raise ValueError(
            f"{given} do not belong together; give x bfloat16 [M, K], K a multiple of 32, and a weight [N, K] as stored"
        )
    weight = (codes, scales) if minima is None else (codes, scales, minima)
    return _call_on_rows(f"{product}_matmul", isa, used, experts, n or rows, x, *weight)


def mx8_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    exponent_bits: int,
    mantissa_bits: int,
    isa: str | None = None,
    used: jax.Array | None = None,
    experts: jax.Array | None = None,
    n: int | None = None,
) -> jax.Array:
    """x @ decoded.T with f32 accumulation, decoded in registers; rows do not depend on M, N and the number of threads.

    Products and sums below about 2^-112 count as zero. Codes that FP8 sets aside for infinity and NaN never stand for a weight.

    Args:
      x: bfloat16 [M, K], K a multiple of 32.
      codes: uint8 [N, K], an element a byte.
      scales: uint8 [N, K/32]; byte s is 2^(s - 127), and 0 is read as scale 0.
      exponent_bits, mantissa_bits: of an element: 4 and 3, or 5 and 2.
      isa: one of `isas("mx8_matmul")`; None is the first.
      used: int32 [B], rows of each window (see `cpu_kernels.used`).
      experts, n: of a weight of several experts.

    Returns:
      f32 [M, N].
    """
    dtypes, elements = tuple(str(array.dtype) for array in (x, codes, scales)), f"e{exponent_bits}m{mantissa_bits}"
    if dtypes != ("bfloat16", "uint8", "uint8"):
        raise ValueError(f"x, codes and scales are {', '.join(dtypes)}, but should be bfloat16, uint8, uint8")
    if elements not in ELEMENTS:
        raise ValueError(f"elements are {elements}, but should be one of {', '.join(ELEMENTS)}")
    rows, k = codes.shape
    if k % 32 or x.shape[1:] != (k,) or scales.shape != (rows, k // 32):
        raise ValueError(
            f"x {list(x.shape)}, codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together; "
            "give x [M, K], codes [N, K] and scales [N, K/32], with K padded to whole blocks"
        )
    return _call_on_rows("mx8_matmul", isa, used, experts, n or rows, x, codes, scales, elements=elements)


def _call_on_rows(product, isa, used, experts, n, x, *weight, **attributes):
    """Multiply x [M, K] by a weight of N rows, or by those of several experts, which the kernel counts."""
    result = jax.ShapeDtypeStruct((len(x), n), jnp.float32)
    rows = used_of_rows(used, len(x)), experts_of_rows(experts, len(x))
    return call(product, isa, result, x, *weight, *rows, **attributes)
