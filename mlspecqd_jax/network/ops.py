"""What a pass is made of, and the only file that asks who runs it: C++ on one CPU, a chip's kernel, or XLA in its best form.

Layers call these operations and look neither at devices nor at how a weight is stored. Each is differentiated as its form in XLA.

A window is as wide as a program makes it, and `used`, int32 [B], says how many of its positions hold something in each row, from
the first on; None is all of them. In C++ the others cost nothing, and are whatever was in memory before; in XLA and in a chip's
kernels they are computed like the rest.

Notation: B batch, W window, S cache length, H query heads, Hkv key/value heads, D size of a query's and a key's head, Dv of a
value's, N outputs, K contracted or hidden size.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import cpu_kernels
from mlspecqd_jax.folds import product, rounded
from mlspecqd_jax.network import attention, norms, rope
from mlspecqd_jax.network.attention import KVCache
from mlspecqd_jax.network.config import Norm, Rope
from mlspecqd_jax.weights.products import multiply, multiply_experts, product_of
from mlspecqd_jax.weights.quantized_array import Leaf
from pallas_kernels import BLOCK, best_product, xla
from pallas_kernels.xla import rows

__all__ = [
    "attend",
    "expert_linear",
    "head_linear",
    "implementation",
    "layer_norm",
    "linear",
    "narrower",
    "product",
    "rms_norm",
    "rotary",
    "rotate",
    "rounded",
    "row_multiple",
    "rows",
    "scaled",
    "write",
]


def linear(x: jax.Array, w: Leaf, *, used: jax.Array | None = None, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x @ w.T over the last axis of x, accumulated in f32.

    Args:
      x: activations [..., K]; [B, W, ..., K] where some positions are not in use.
      w: weight [N, K]; a plain one is used in its own dtype, a quantized one by the product that it is arranged for, or else by the
        best that reads it as it is stored.
      used: int32 [B], or None.
      out_dtype: dtype of the result; None gives x's (the head asks for f32).

    Returns:
      [..., N].
    """
    y = multiply(x.reshape(-1, x.shape[-1]), w, used=_used_rows(used, x))
    return y.reshape(*x.shape[:-1], w.shape[0]).astype(out_dtype or x.dtype)


def expert_linear(x: jax.Array, w: Leaf, experts: jax.Array, number: int) -> jax.Array:
    """`weights.products.multiply_experts`, [T, C, N] in x's dtype, of x [T, C, K] or [T, 1, K] and experts int32 [T, C]."""
    return multiply_experts(x, w, experts, number).astype(x.dtype)


def head_linear(x: jax.Array, w: jax.Array, *, used: jax.Array | None = None) -> jax.Array:
    """x[..., h, :] @ w_h.T for each head h, accumulated in f32.

    One product for all heads, but on CPU, where XLA's would not compute a row alike in all windows: there in C++, or head by head.

    Args:
      x: activations [B, W, H, K].
      w: weights of all heads, one after another, [H * N, K], in x's dtype.
      used: int32 [B], or None.

    Returns:
      [B, W, H, N] in x's dtype.
    """
    (batch, width, heads, k), n = x.shape, w.shape[0] // x.shape[2]

    def together(x, w):
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        axes = (((2,), (2,)), ((1,), (0,)))
        rows, weights = x.reshape(-1, heads, k), w.reshape(heads, n, k)
        y = jax.lax.dot_general(rows, weights, axes, precision=precision, preferred_element_type=jnp.float32)  # [H, B W, N]
        return jnp.swapaxes(y, 0, 1)

    def by_head(x, w):
        in_use = jnp.ones((batch, width), bool) if used is None else jnp.arange(width)[None] < used[:, None]
        head = jnp.where(in_use.reshape(-1, 1), jnp.arange(heads, dtype=jnp.int32)[None], -1)
        return multiply_experts(x.reshape(-1, heads, k), w, head, heads)

    split = jax.sharding.get_abstract_mesh().size > 1
    y = together(x, w) if split else jax.lax.platform_dependent(x, w, cpu=by_head, default=together)
    return y.reshape(batch, width, heads, n).astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, norm: Norm, used: jax.Array | None = None) -> jax.Array:
    """`norms.rms_norm` of x [..., K], or [B, W, ..., K] where some positions are not in use, with its weight [K]."""

    def in_cpp(x, weight, used):
        rows = x.reshape(-1, x.shape[-1])
        return cpu_kernels.rms_norm(rows, weight, norm.eps, norm.offset, used=_used_rows(used, x)).reshape(x.shape)

    return _computed(in_cpp, functools.partial(norms.rms_norm, norm=norm), used, x, weight)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, norm: Norm, used: jax.Array | None = None) -> jax.Array:
    """`norms.layer_norm` of x, as `rms_norm` takes it, with its weight and bias [K]."""

    def in_cpp(x, weight, bias, used):
        rows = x.reshape(-1, x.shape[-1])
        return cpu_kernels.layer_norm(rows, weight, bias, norm.eps, norm.offset, used=_used_rows(used, x)).reshape(x.shape)

    return _computed(in_cpp, functools.partial(norms.layer_norm, norm=norm), used, x, weight, bias)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """`product` of x and a factor, which is rounded to x's dtype."""
    return x if factor == 1 else product(x, jnp.asarray(factor, x.dtype))


def rotary(positions: jax.Array, rotation: Rope) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, f32 [B, W, D / 2], of the rotation angles at positions int32 [B, W], times the rope's magnitude."""
    frequencies = jnp.asarray(rotation.frequencies, jnp.float32)
    found = cpu_kernels.on_cpu(cpu_kernels.angles, rope.angles, positions.astype(jnp.int32), frequencies, unit="bfloat16")
    return tuple(found) if rotation.magnitude == 1 else tuple(rotation.magnitude * part for part in found)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, used: jax.Array | None = None) -> jax.Array:
    """`rope.rotate` of x [B, W, heads, D] by the given angles, dimensions beyond theirs as they are; return [B, heads, W, D]."""
    if x.shape[-1] > 2 * cos.shape[-1]:
        turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
        return jnp.concatenate([rotate(turned, cos, sin, used), jnp.swapaxes(rest, 1, 2)], axis=-1)

    # XLA:CPU fuses these products and sums with what is around them, otherwise for a window of one row than for others.
    def in_cpp(x):
        return _differentiated_as(rope.rotate, cpu_kernels.rotate)(used, x, cos, sin)

    return cpu_kernels.on_cpu(in_cpp, lambda x: rope.rotate(x, cos, sin), x)


def write(cache: KVCache, k: jax.Array, v: jax.Array | None, start: jax.Array, used: jax.Array | None = None) -> KVCache:
    """Store k [B, Hkv, W, D] and v [B, Hkv, W, Dv] at positions start[r] + 0..W-1; XLA updates both in place in nested loops.

    Without v, which the cache then lacks too, k alone. In C++ what is not in use is not stored.
    """

    def in_xla(buffer, start, values, used):
        return xla.put_window(buffer, start, values)

    def put(buffer, values):
        return cpu_kernels.on_cpu(cpu_kernels.put_window, in_xla, buffer, start, values, used, unit="bfloat16")

    return jax.tree.map(put, cache, KVCache(k, v))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    first: jax.Array,
    last: jax.Array,
    sinks: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    used: jax.Array | None = None,
) -> jax.Array:
    """`attention.attend`: softmax(cap tanh(scale q k^T / cap)) v, over the slots that a query sees; [B, W, H * Dv] in q's dtype.

    Args:
      q, k, v: [B, H, W, D], [B, Hkv, S, D] and [B, Hkv, S, Dv]; without v the keys are the values too.
      first, last: int32 [B, W]; query w of row r sees the slots from first[r, w] to last[r, w], both included.
      sinks: [H] in q's dtype, a logit of each head that the softmax sums too, and whose probability goes to no value; or None.
      scale: None is 1 / sqrt(D).
      cap: bound of the logits' magnitude, softly; None leaves them as they are.
      used: int32 [B], or None.
    """
    in_xla = functools.partial(attention.attend, scale=q.shape[-1] ** -0.5 if scale is None else scale, cap=cap)
    in_cpp = functools.partial(_attend_in_cpp, scale=scale, cap=cap)
    given = () if sinks is None else (sinks,)
    return _computed(in_cpp, in_xla, used, q, k, k if v is None else v, first, last, *given)


def row_multiple(weights: Iterable[Leaf], dtype: str, chip: str, mesh: Mesh | None = None) -> int | None:
    """Return to how many rows windows are padded so that a pass computes a row alike for all of them; None if that is not known.

    Norms, rotations and what is elementwise have one order of operations everywhere, attention and each product what they promise.

    Args:
      weights: of the pass.
      dtype: of the activations; a plain weight is used in its own.
      chip: of `pallas_kernels.chip_of`, or the platform, of the device that runs it.
      mesh: over which the weights are split, or None.
    """
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        in_cpp = chip == "cpu" and cpu_kernels.usable(dtype)
        found = [1 if in_cpp else xla.row_multiple(chip, dtype)]
        for w in weights:
            found.append(product_of(w, dtype, chip).row_multiple(chip, str(getattr(w, "dtype", dtype))))
    known = [multiple for multiple in found if multiple is not None]
    return math.lcm(*known) if len(known) == len(found) else None


def depends(weights: Iterable[Leaf], dtype: str, chip: str, mesh: Mesh | None = None) -> tuple[str, ...]:
    """Return what programs of a model depend on beside its weights: which products they run, and which functions in C++.

    What they call is known to XLA afterwards.

    Args:
      weights: of the model, plain vectors among them.
      dtype, chip, mesh: as of `row_multiple`.
    """
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        in_cpp = [unit for unit in (dtype, "bfloat16") if chip == "cpu" and cpu_kernels.usable(unit)]
        matrices = (w for w in weights if len(w.shape) == 2)
        kinds = {(getattr(w, "format", None), getattr(w, "product", None), str(getattr(w, "dtype", dtype))): w for w in matrices}
        return (*in_cpp, *(product_of(kind, dtype, chip).name for kind in kinds.values()))


def narrower(whole: int, dtype: str, chip: str, mesh: Mesh | None = None) -> tuple[int, ...]:
    """Return the widths under `whole` at which a window takes so much less time that a program of its own pays, ascending.

    On CPU the C++ operations take time by the rows in use, so that one row spares no more than what is elementwise; in XLA's form
    each row takes its time, and an even number of them. A chip runs as many rows as a window has in the time of one.

    Args:
      whole: the widest window.
      dtype, chip, mesh: as of `row_multiple`.
    """
    if chip != "cpu":
        return ()
    in_cpp = mesh is None and cpu_kernels.usable(dtype)
    return tuple(width for width in ((1,) if in_cpp else (2, 4, 8, 16, 32)) if width < whole)


def implementation(chip: str) -> str:
    """Name what `linear` runs in bfloat16 on a chip (of `pallas_kernels.chip_of`), for plain and for quantized weights."""
    if chip != "cpu":
        kernel = {"tpu": "Pallas TPU kernel", "gpu": "Pallas GPU kernel"}
        mxfp4 = best_product(chip, "bfloat16", BLOCK, BLOCK)
        assert mxfp4 is not None, "the last of them can always be had"
        others = best_product(chip, "bfloat16", BLOCK, BLOCK, format="int8")
        alike = ", another for other formats and experts" if others is not None and others.name.endswith("table") else ""
        return f"XLA dot; {kernel.get(mxfp4.name, f'XLA ({mxfp4.name})')} for mxfp4{alike}"
    bf16, mxfp4 = cpu_kernels.isas("matmul"), cpu_kernels.isas("mxfp4_matmul")
    if not bf16:
        return "XLA dot, at least two rows"
    mx8 = cpu_kernels.isas("mx8_matmul")
    return (
        f"C++ for bfloat16 ({bf16[0]}), float16 and float32, for mxfp4 ({mxfp4[0]}, activations in 8 bits), for mxfp6 likewise and "
        f"for mxfp8 ({mx8[0]})"
    )


def _used_rows(used, x):
    """Of each of B windows, how many rows [..., K] of x [B, W, ..., K] are in use; None is all."""
    return None if used is None else used * math.prod(x.shape[2:-1])


def _computed(in_cpp: Callable, in_xla: Callable, used: jax.Array | None, *arguments: jax.Array) -> jax.Array:
    """Run in_cpp(*arguments, used=used) or in_xla(*arguments); both are differentiated as the latter."""
    return cpu_kernels.on_cpu(_differentiated_as(in_xla, in_cpp), lambda _, *arguments: in_xla(*arguments), used, *arguments)


def _differentiated_as(form: Callable, function: Callable) -> Callable:
    """Return a function of (used, *arguments): function(*arguments, used=used), with the derivative of form(*arguments)."""

    @jax.custom_jvp
    def run(used, *arguments):
        return function(*arguments, used=used)

    @run.defjvp
    def _(primals, tangents):
        return run(*primals), jax.jvp(form, primals[1:], tangents[1:])[1]

    return run


def _attend_in_cpp(q, k, v, first, last, sinks=None, *, scale, cap, used):
    out = cpu_kernels.attention(q, k, v, first, last, sinks, scale=scale, cap=cap, used=used)
    return out.reshape(*out.shape[:2], -1).astype(q.dtype)
