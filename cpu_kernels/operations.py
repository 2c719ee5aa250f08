"""What a pass does beside its products, in C++ as JAX functions, on CPU alone: norms, attention, rotations, the write to a cache.

Notation: M rows of activations, K what is normed; B batch, W window, S slots of a cache, H query heads, Hkv key/value heads, D size
of a query's and a key's head, Dv of a value's.
"""

import jax
import jax.numpy as jnp

from cpu_kernels.library import DTYPES, call, target
from cpu_kernels.used import used_of_rows, used_of_windows


def rms_norm(
    x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0, isa: str | None = None, used: jax.Array | None = None
) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) in f32.

    A row's squares are added in one fixed order, whatever M and the number of threads.

    Args:
      x: [M, K], bfloat16, float16 or float32.
      weight: [K], in x's dtype.
      eps: what is added to the mean.
      offset: what is added to the weight, in f32.
      isa: one of `isas("rms_norm", dtype)`; None is the first.
      used: int32 [B], rows of each window (see `cpu_kernels.used`).

    Returns:
      [M, K] in x's dtype.
    """
    if x.dtype != weight.dtype or x.dtype.name not in DTYPES or x.shape[1:] != weight.shape:
        raise ValueError(f"x {x.dtype}{list(x.shape)} and weight {weight.dtype}{list(weight.shape)} should be [M, K] and [K]")
    f32 = jnp.dtype(jnp.float32).type
    constants = {"eps": f32(eps), "offset": f32(offset or -0.0)}  # -0 + w is w, also where that is -0
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return call("rms_norm", isa, result, x, weight, used_of_rows(used, len(x)), **constants)


def layer_norm(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    eps: float,
    offset: float = 0.0,
    isa: str | None = None,
    used: jax.Array | None = None,
) -> jax.Array:
    """y / sqrt(mean(y^2) + eps) * (offset + weight) + bias in f32, with y = x - mean(x).

    Args:
      x: [M, K], bfloat16, float16 or float32.
      weight, bias: [K], in x's dtype.
      eps, offset, isa, used: as of `rms_norm`, and so is the order of the sums.

    Returns:
      [M, K] in x's dtype.
    """
    of_one = len({array.dtype for array in (x, weight, bias)}) == 1 and x.dtype.name in DTYPES
    if not of_one or not x.shape[1:] == weight.shape == bias.shape:
        given = ", ".join(f"{array.dtype}{list(array.shape)}" for array in (x, weight, bias))
        raise ValueError(f"x, weight and bias are {given}, but should be [M, K], [K] and [K] of one of {', '.join(DTYPES)}")
    f32 = jnp.dtype(jnp.float32).type
    constants = {"eps": f32(eps), "offset": f32(offset or -0.0)}
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return call("layer_norm", isa, result, x, weight, bias, used_of_rows(used, len(x)), **constants)


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
    used: jax.Array | None = None,
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
      used: int32 [B], positions of each window (see `cpu_kernels.used`).

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
    return call("attention", isa, result, q, k, v, first, last, sinks, used_of_windows(used, batch, window), **scores)


def angles(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, f32 [B, W, D / 2], of positions int32 [B, W] times frequencies f32 [D / 2]."""
    if positions.dtype != jnp.int32 or frequencies.dtype != jnp.float32 or (positions.ndim, frequencies.ndim) != (2, 1):
        raise ValueError(
            f"positions {positions.dtype}{list(positions.shape)} and frequencies {frequencies.dtype}{list(frequencies.shape)} "
            "should be int32 [B, W] and float32 [D / 2]"
        )
    result = jax.ShapeDtypeStruct((*positions.shape, *frequencies.shape), jnp.float32)
    cos, sin = jax.ffi.ffi_call(target("angles"), (result, result), vmap_method="sequential")(positions, frequencies)
    return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, used: jax.Array | None = None) -> jax.Array:
    """Rotate the pairs (i, i + D/2) of x [B, W, H, D] by angles of cos and sin, f32 [B, W, D / 2], in f32.

    Args:
      x: [B, W, H, D], bfloat16, float16 or float32.
      cos, sin: f32 [B, W, D / 2].
      used: int32 [B], positions of each window (see `cpu_kernels.used`).

    Returns:
      [B, H, W, D] in x's dtype.
    """
    batch, window, heads, depth = x.shape
    if x.dtype.name not in DTYPES or not (cos.shape == sin.shape == (batch, window, depth // 2)) or depth % 2:
        raise ValueError(f"x {x.dtype}{list(x.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)} do not belong together")
    result = jax.ShapeDtypeStruct((batch, heads, window, depth), x.dtype)
    run = jax.ffi.ffi_call(target(f"rotate_{x.dtype.name}"), result, vmap_method="sequential")
    return run(x, cos, sin, used_of_windows(used, batch, window))


def put_window(buffer: jax.Array, start: jax.Array, values: jax.Array, used: jax.Array | None = None) -> jax.Array:
    """Store values [B, H, W, D] in buffer [B, H, S, D] at positions start[r] + 0..W-1, in place; what falls outside is dropped.

    Args:
      buffer, values: of one dtype.
      start: int32 [B].
      used: int32 [B], positions of each window (see `cpu_kernels.used`); the others are not written.
    """
    if buffer.dtype != values.dtype or start.dtype != jnp.int32:
        raise ValueError(f"buffer, start and values are {buffer.dtype}, {start.dtype}, {values.dtype}, not of one dtype and int32")
    run = jax.ffi.ffi_call(target("put_window"), jax.ShapeDtypeStruct(buffer.shape, buffer.dtype), input_output_aliases={0: 0})
    return run(buffer, start, values, used_of_windows(used, values.shape[0], values.shape[2]))
