"""The C++ products as JAX functions, by XLA's foreign function interface. They exist on CPU alone, and where `isas` names one.

Notation: M rows of activations, N outputs, K contracted. Weights are [N, K], K last.
"""

import ctypes
import functools

import jax
import jax.numpy as jnp

from cpu_kernels.build import library_paths

DTYPES = ("bfloat16", "float16", "float32")
OF_ANY_DTYPE = ("matmul", "rms_norm", "layer_norm", "attention", "rotate")  # for each of DTYPES
OF_BFLOAT16 = ("mxfp4_matmul", "mxfp6_matmul", "mx8_matmul")
# Of scales that are no powers of two.
OF_NUMBERS = ("nvfp4_matmul", "int4_matmul", "uint4_matmul", "int8_matmul", "int8_groups_matmul", "uint8_matmul")
OF_POSITIONS = ("angles", "put_window")
# What each library holds, as `build` names them.
UNITS = {dtype: tuple(f"{product}_{dtype}" for product in OF_ANY_DTYPE) for dtype in DTYPES}
UNITS |= {"mx": OF_BFLOAT16, "grouped": OF_NUMBERS, "positions": OF_POSITIONS}
TOGETHER = ("bfloat16", "mx", "positions")  # what a model in bfloat16 and its twin run is compiled side by side
ELEMENTS = ("e4m3", "e5m2")  # of mx8_matmul: exponent and mantissa bits
SIX_BITS = {2: "e2m3", 3: "e3m2"}  # of mxfp6_matmul, by exponent bits


@functools.cache
def isas(product: str, dtype: str = "bfloat16") -> tuple[str, ...]:
    """Return the instruction sets for which a product is there and which this processor can run, the best first.

    The first call compiles the library if need be; where that cannot be done there are none.
    """
    name = _named(product, dtype)
    library = _library(_unit_of(name))
    if library is None:
        return ()
    names = getattr(library, f"{name}_isas")
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split(","))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def dense_matmul(x: jax.Array, w: jax.Array, isa: str | None = None) -> jax.Array:
    """x @ w.T with f32 accumulation; each row of the result is bit for bit the same whatever M, N and the number of threads.

    Args:
      x: [M, K], bfloat16, float16 or float32.
      w: [N, K], in x's dtype.
      isa: one of `isas("matmul", dtype)`; None is the first.

    Returns:
      f32 [M, N].
    """
    if x.dtype != w.dtype or x.dtype.name not in DTYPES or x.ndim != 2 or x.shape[1:] != w.shape[1:]:
        raise ValueError(
            f"x {x.dtype}{list(x.shape)} and w {w.dtype}{list(w.shape)} should be [M, K] and [N, K] of one of {', '.join(DTYPES)}"
        )
    return _call("matmul", isa, jax.ShapeDtypeStruct((len(x), len(w)), jnp.float32), x, w)


@dense_matmul.defjvp
def _(isa, primals, tangents):
    (x, w), (dx, dw) = primals, tangents

    def plain(x, w):
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)

    return dense_matmul(x, w, isa), plain(dx, w) + plain(x, dw)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0, isa: str | None = None) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) in f32.

    A row's squares are added in one fixed order, whatever M and the number of threads.

    Args:
      x: [M, K], bfloat16, float16 or float32.
      weight: [K], in x's dtype.
      eps: what is added to the mean.
      offset: what is added to the weight, in f32.
      isa: one of `isas("rms_norm", dtype)`; None is the first.

    Returns:
      [M, K] in x's dtype.
    """
    if x.dtype != weight.dtype or x.dtype.name not in DTYPES or x.shape[1:] != weight.shape:
        raise ValueError(f"x {x.dtype}{list(x.shape)} and weight {weight.dtype}{list(weight.shape)} should be [M, K] and [K]")
    f32 = jnp.dtype(jnp.float32).type
    constants = {"eps": f32(eps), "offset": f32(offset or -0.0)}  # -0 + w is w, also where that is -0
    return _call("rms_norm", isa, jax.ShapeDtypeStruct(x.shape, x.dtype), x, weight, **constants)


def layer_norm(
    x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float, offset: float = 0.0, isa: str | None = None
) -> jax.Array:
    """y / sqrt(mean(y^2) + eps) * (offset + weight) + bias in f32, with y = x - mean(x).

    Args:
      x: [M, K], bfloat16, float16 or float32.
      weight, bias: [K], in x's dtype.
      eps, offset, isa: as of `rms_norm`, and so is the order of the sums.

    Returns:
      [M, K] in x's dtype.
    """
    of_one = len({array.dtype for array in (x, weight, bias)}) == 1 and x.dtype.name in DTYPES
    if not of_one or not x.shape[1:] == weight.shape == bias.shape:
        given = ", ".join(f"{array.dtype}{list(array.shape)}" for array in (x, weight, bias))
        raise ValueError(f"x, weight and bias are {given}, but should be [M, K], [K] and [K] of one of {', '.join(DTYPES)}")
    f32 = jnp.dtype(jnp.float32).type
    constants = {"eps": f32(eps), "offset": f32(offset or -0.0)}
    return _call("layer_norm", isa, jax.ShapeDtypeStruct(x.shape, x.dtype), x, weight, bias, **constants)


def mxfp4_matmul(x: jax.Array, packed: jax.Array, scales: jax.Array, isa: str | None = None) -> jax.Array:
    """x @ decoded.T with each block of x rounded to eight bits: q = round(127 x / a) and x taken for q a / 127, a = max |block|.

    Sums over a block are exact, and added in f32. Rows do not depend on M, N and the number of threads. A row of x with a NaN or
    an infinity gives a row of NaN, and blocks below 2^-120 count as zero.

    Args:
      x: bfloat16 [M, K], K a multiple of 32.
      packed: uint8 [N, K/2], element 2i in the low half of byte i.
      scales: uint8 [N, K/32]; byte s is 2^(s - 127), and 0 is read as scale 0.
      isa: one of `isas("mxfp4_matmul")`; None is the first.

    Returns:
      f32 [M, N].
    """
    dtypes = tuple(str(array.dtype) for array in (x, packed, scales))
    if dtypes != ("bfloat16", "uint8", "uint8"):
        raise ValueError(f"x, packed and scales are {', '.join(dtypes)}, but should be bfloat16, uint8, uint8")
    k, n = x.shape[-1], packed.shape[0]
    if k % 32 or x.ndim != 2 or packed.shape != (n, k // 2) or scales.shape != (n, k // 32):
        raise ValueError(
            f"x {list(x.shape)}, packed {list(packed.shape)} and scales {list(scales.shape)} do not belong together; "
            "give x [M, K], packed [N, K/2] and scales [N, K/32], with K padded to whole blocks"
        )
    return _call("mxfp4_matmul", isa, jax.ShapeDtypeStruct((len(x), n), jnp.float32), x, packed, scales)


def mxfp6_matmul(x: jax.Array, codes: jax.Array, scales: jax.Array, exponent_bits: int, isa: str | None = None) -> jax.Array:
    """x @ decoded.T for a weight in MXFP6, with x rounded and sums added as `mxfp4_matmul` does.

    Args:
      x: bfloat16 [M, K], K a multiple of 32.
      codes: uint8 [N, 3K/4]: of each 32 elements 24 bytes. 16 hold the lower four bits of the codes, element i in the low half of
        byte i and i + 16 in the high half; 8 their upper two bits, element 8f + i in bits 2f and 2f + 1 of byte i.
      scales: uint8 [N, K/32]; byte s is 2^(s - 127), and 0 is read as scale 0.
      exponent_bits: of an element: 2 with three bits of mantissa, or 3 with two.
      isa: one of `isas("mxfp6_matmul")`; None is the first.

    Returns:
      f32 [M, N].
    """
    dtypes = tuple(str(array.dtype) for array in (x, codes, scales))
    if dtypes != ("bfloat16", "uint8", "uint8"):
        raise ValueError(f"x, codes and scales are {', '.join(dtypes)}, but should be bfloat16, uint8, uint8")
    if exponent_bits not in SIX_BITS:
        raise ValueError(f"elements have {exponent_bits} bits of exponent, but should have 2 or 3")
    k, n = x.shape[-1], codes.shape[0]
    if k % 32 or x.ndim != 2 or codes.shape != (n, k * 6 // 8) or scales.shape != (n, k // 32):
        raise ValueError(
            f"x {list(x.shape)}, codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together; "
            "give x [M, K], codes [N, 3K/4] and scales [N, K/32], with K padded to whole blocks"
        )
    result = jax.ShapeDtypeStruct((len(x), n), jnp.float32)
    return _call("mxfp6_matmul", isa, result, x, codes, scales, elements=SIX_BITS[exponent_bits])


def grouped_matmul(
    x: jax.Array, codes: jax.Array, scales: jax.Array, minima: jax.Array | None = None, isa: str | None = None, *, bits: int = 4
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
      isa: one of `isas(...)` of the product, a name of `OF_NUMBERS`; None is the first.
      bits: of a code, 4 or 8, if scales are float16.

    Returns:
      f32 [M, N].
    """
    of_groups = {4: ("int4", "uint4"), 8: ("int8_groups", "uint8")}[bits][minima is not None]
    product = {"uint8": "nvfp4", "float16": of_groups, "float32": "int8"}[scales.dtype.name]
    bits, n, k = {"nvfp4": 4, "int8": 8}.get(product, bits), len(codes), x.shape[-1]
    groups = {"nvfp4": k // 16, "int8": 1}.get(product, scales.shape[-1])
    fits = x.ndim == 2 and k % 32 == 0 and codes.shape == (n, k * bits // 8) and scales.shape == (n, groups)
    fits = fits and (x.dtype, codes.dtype) == (jnp.bfloat16, jnp.uint8)
    if not fits or (minima is not None and (minima.shape, minima.dtype) != (scales.shape, jnp.float16)):
        arrays = {"x": x, "codes": codes, "scales": scales} | ({} if minima is None else {"minima": minima})
        given = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
        raise ValueError(
            f"{given} do not belong together; give x bfloat16 [M, K], K a multiple of 32, and a weight [N, K] as stored"
        )
    result = jax.ShapeDtypeStruct((len(x), n), jnp.float32)
    return _call(f"{product}_matmul", isa, result, x, codes, scales, *([] if minima is None else [minima]))


def mx8_matmul(
    x: jax.Array, codes: jax.Array, scales: jax.Array, exponent_bits: int, mantissa_bits: int, isa: str | None = None
) -> jax.Array:
    """x @ decoded.T with f32 accumulation, decoded in registers; rows do not depend on M, N and the number of threads.

    Products and sums below about 2^-112 count as zero. Codes that FP8 sets aside for infinity and NaN never stand for a weight.

    Args:
      x: bfloat16 [M, K], K a multiple of 32.
      codes: uint8 [N, K], an element a byte.
      scales: uint8 [N, K/32]; byte s is 2^(s - 127), and 0 is read as scale 0.
      exponent_bits, mantissa_bits: of an element: 4 and 3, or 5 and 2.
      isa: one of `isas("mx8_matmul")`; None is the first.

    Returns:
      f32 [M, N].
    """
    dtypes, elements = tuple(str(array.dtype) for array in (x, codes, scales)), f"e{exponent_bits}m{mantissa_bits}"
    if dtypes != ("bfloat16", "uint8", "uint8"):
        raise ValueError(f"x, codes and scales are {', '.join(dtypes)}, but should be bfloat16, uint8, uint8")
    if elements not in ELEMENTS:
        raise ValueError(f"elements are {elements}, but should be one of {', '.join(ELEMENTS)}")
    n, k = codes.shape
    if k % 32 or x.shape[1:] != (k,) or scales.shape != (n, k // 32):
        raise ValueError(
            f"x {list(x.shape)}, codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together; "
            "give x [M, K], codes [N, K] and scales [N, K/32], with K padded to whole blocks"
        )
    return _call("mx8_matmul", isa, jax.ShapeDtypeStruct((len(x), n), jnp.float32), x, codes, scales, elements=elements)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    last: jax.Array,
    sinks: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    isa: str | None = None,
) -> jax.Array:
    """softmax(cap tanh(scale q k^T / cap)) v, each query over its own range of slots, in f32.

    A row's bits depend neither on other rows nor on S: the slots that it sees are gone through in order.

    Args:
      q: [B, H, W, D], bfloat16, float16 or float32.
      k, v: [B, Hkv, S, D] and [B, Hkv, S, Dv] in q's dtype, H a multiple of Hkv.
      first, last: int32 [B, W]; the query at [b, w] sees the slots from first[b, w] to last[b, w], both included.
      sinks: [H], a logit of each head that the softmax sums too, and whose probability goes to no value; or None.
      scale: of the products; None is 1 / sqrt(D).
      cap: bound of the logits' magnitude, softly; None leaves them as they are.
      isa: one of `isas("attention", dtype)`; None is the first.

    Returns:
      f32 [B, W, H, Dv].
    """
    batch, heads, window, depth = q.shape
    of_one = len({array.dtype for array in (q, k, v)}) == 1 and q.dtype.name in DTYPES
    if not of_one or {str(array.dtype) for array in (first, last)} != {"int32"}:
        raise ValueError(f"q, k and v should be of one dtype of {', '.join(DTYPES)}, first and last int32")
    f32 = jnp.dtype(jnp.float32).type
    scale = f32(1) / f32(depth**0.5) if scale is None else scale
    sinks = jnp.full(heads, -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    result = jax.ShapeDtypeStruct((batch, window, heads, v.shape[-1]), jnp.float32)
    scores = {"scale": f32(scale), "cap": f32(cap or 0)}
    return _call("attention", isa, result, q, k, v, first, last, sinks, **scores)


def angles(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, f32 [B, W, D / 2], of positions int32 [B, W] times frequencies f32 [D / 2]."""
    if positions.dtype != jnp.int32 or frequencies.dtype != jnp.float32 or (positions.ndim, frequencies.ndim) != (2, 1):
        raise ValueError(
            f"positions {positions.dtype}{list(positions.shape)} and frequencies {frequencies.dtype}{list(frequencies.shape)} "
            "should be int32 [B, W] and float32 [D / 2]"
        )
    result = jax.ShapeDtypeStruct((*positions.shape, *frequencies.shape), jnp.float32)
    cos, sin = jax.ffi.ffi_call(_target("angles"), (result, result), vmap_method="sequential")(positions, frequencies)
    return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + D/2) of x [B, W, H, D] by angles of cos and sin, f32 [B, W, D / 2], in f32.

    Returns:
      [B, H, W, D] in x's dtype: bfloat16, float16 or float32.
    """
    batch, window, heads, depth = x.shape
    if x.dtype.name not in DTYPES or not (cos.shape == sin.shape == (batch, window, depth // 2)) or depth % 2:
        raise ValueError(f"x {x.dtype}{list(x.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)} do not belong together")
    result = jax.ShapeDtypeStruct((batch, heads, window, depth), x.dtype)
    return jax.ffi.ffi_call(_target(_named("rotate", x.dtype.name)), result, vmap_method="sequential")(x, cos, sin)


def put_window(buffer: jax.Array, start: jax.Array, values: jax.Array) -> jax.Array:
    """Store values [B, H, W, D] in buffer [B, H, S, D] at positions start[r] + 0..W-1, in place; what falls outside is dropped.

    Args:
      buffer, values: of one dtype.
      start: int32 [B].
    """
    if buffer.dtype != values.dtype or start.dtype != jnp.int32:
        raise ValueError(f"buffer, start and values are {buffer.dtype}, {start.dtype}, {values.dtype}, not of one dtype and int32")
    call = jax.ffi.ffi_call(_target("put_window"), jax.ShapeDtypeStruct(buffer.shape, buffer.dtype), input_output_aliases={0: 0})
    return call(buffer, start, values)


def on_cpu(kernel, otherwise, *arguments, dtypes: tuple[str, ...] = DTYPES, unit: str | None = None):
    """Call `kernel` where the program is for one CPU, its library is there and all floats have one of `dtypes`; else `otherwise`.

    XLA cannot split a foreign call over the devices of a mesh; it would gather every operand on each.

    Args:
      unit: what the library is called (UNITS); None for the floats' dtype.
    """
    floats = {array.dtype.name for array in arguments if jnp.issubdtype(array.dtype, jnp.floating)}
    if len(floats) != 1 or not floats.issubset(dtypes) or not usable(unit or next(iter(floats))):
        return otherwise(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=kernel, default=otherwise)


def usable(unit: str = "bfloat16") -> bool:
    """Return whether a program that is traced here can call the functions of a unit, which is compiled if need be."""
    return jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty and _library(unit) is not None


def _call(product, isa, result, *arguments, **attributes):
    dtype = arguments[0].dtype.name
    here = isas(product, dtype)
    if not here or isa not in (None, *here):
        raise NotImplementedError(f"{product} for {isa or 'any instruction set'}: this machine has {', '.join(here) or 'none'}")
    call = jax.ffi.ffi_call(_target(_named(product, dtype)), result, vmap_method="sequential")
    return call(*arguments, isa=isa or "", **attributes)


def _named(product, dtype):
    return f"{product}_{dtype}" if product in OF_ANY_DTYPE else product


def _unit_of(name):
    return next(unit for unit, names in UNITS.items() if name in names)


def _target(name):
    """Return what XLA knows a function by, after its library is there; where it cannot be, XLA says that it knows no such name."""
    _library(_unit_of(name))
    return _registered(name)


def _registered(name):
    return f"mlspecqd_{name}"


@functools.cache
def _library(unit):
    units = TOGETHER if unit in TOGETHER else (unit,)
    paths = library_paths(units)
    if paths is None:
        return None
    library = ctypes.CDLL(str(paths[units.index(unit)]))
    for name in UNITS[unit]:
        jax.ffi.register_ffi_target(_registered(name), jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library
