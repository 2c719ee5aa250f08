"""The cast to formats whose scales are numbers: integers in groups or by row, NVFP4, FP8 by row or by block.

A group's scale comes from its largest magnitude, and is rounded to the type it is stored in before anything is divided by it:

- integers of an offset: the element of largest magnitude becomes -2^(bits - 1), the one integer more that there is (as llama.cpp's
  Q4_0), in 8 bits +-127; with a minimum, the group's range is divided into 2^bits - 1 steps;
- floats: the largest magnitude becomes the largest element. NVFP4's scales are E4M3, so they count from the one number of the
  whole weight with which the largest of them is the largest E4M3.

A search by squared error tries each of `FACTORS` times that scale, and keeps for each group the best.
"""

import functools

import jax
import jax.numpy as jnp

from mlspecqd_jax.weights.formats import E4M3, STEP, Element, Format, Integer
from mlspecqd_jax.weights.mx import element_codes, stored_codes
from pallas_kernels import group_values, number_of_scale

FACTORS = tuple(0.70 + 0.025 * i for i in range(17))  # 0.7 to 1.1


@functools.partial(jax.jit, static_argnames=("f", "search"))
def encode(w: jax.Array, f: Format, search: bool) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return (the arrays of `QuantizedArray` by role; whether every value of w [N, K] is finite)."""
    n, k = w.shape
    w = w.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(w))
    around = {}
    if f.scale == "e4m3":
        scale = tensor_scale_of(w, f)
        around["tensor_scale"], w = scale[None], w / scale
    groups = grouped(w, f)  # [N / rows, rows, G, group]
    scales, minima = group_scales(groups, f, search)
    codes = group_codes(groups, scales, minima, f)
    codes = codes.reshape(codes.shape[0] * codes.shape[1], -1)[:n, : k + -k % STEP]
    filler = jnp.arange(codes.shape[1]) >= k
    codes = jnp.where(filler, getattr(f.element, "offset", 0), codes)
    stored = {"codes": stored_codes(codes, f), "scales": scales[:, 0]}
    if minima is not None:
        stored["minima"] = minima[:, 0]
    return stored | around, finite


def tensor_scale_of(w: jax.Array, f: Format) -> jax.Array:
    """Return the number, f32 [], of which the scales of a whole weight are multiples."""
    assert isinstance(f.element, Element), "no format of integers has such scales"
    largest = jnp.max(jnp.abs(w), initial=0)
    return jnp.where(largest > 0, largest / (f.element.largest * E4M3.largest), 1)


def grouped(w: jax.Array, f: Format) -> jax.Array:
    """Return a weight [N, K], filled up, by groups that share a scale: [N / rows, rows, G, group]."""
    n, k = w.shape[0], w.shape[1] + -w.shape[1] % STEP
    group = f.group or k
    # What is added repeats the last column, so that it changes neither the range of a group nor its largest magnitude.
    w = jnp.pad(jnp.pad(w, ((0, -n % f.rows), (0, 0))), ((0, 0), (0, k + -k % group - w.shape[1])), mode="edge")
    return w.reshape(-1, f.rows, w.shape[1] // group, group)


def group_scales(
    groups: jax.Array, f: Format, search: bool, weights: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Return (scales [N / rows, 1, G], minima or None), as they are stored, of groups f32 [N / rows, rows, G, group].

    The squares of a search weigh 1, or so much, f32 [group].
    """
    return _best(groups, f, weights) if search else _scales(groups, f, 1.0)


def _scales(groups, f, factor):
    """Return (scales [N / rows, 1, G], minima or None) as they are stored."""
    if f.minimum:
        least, most = jnp.min(groups, (1, 3)), jnp.max(groups, (1, 3))
        middle = (least + most) / 2
        least = _stored_number(middle + factor * (least - middle), "float16")
        step = factor * (most - middle) * 2 / (2**f.bits - 1)
        return _stored_number(step, f.scale)[:, None], least[:, None]
    magnitude = jnp.abs(groups)
    largest = jnp.max(magnitude, (1, 3))
    if isinstance(f.element, Integer) and f.bits == 4:
        is_negative = jnp.max(jnp.where(groups < 0, magnitude, 0), (1, 3)) >= largest
        scale = jnp.where(is_negative, largest, -largest) / f.element.offset
    else:
        scale = largest / (127 if isinstance(f.element, Integer) else f.element.largest)
    scale = (factor * scale)[:, None]
    if f.scale == "e4m3":
        return element_codes(scale, E4M3).astype(jnp.uint8), None
    return _stored_number(scale, f.scale), None


def _stored_number(value, dtype):
    """Round to a type; float16 ends at 65504, to which what is larger is set."""
    largest = jnp.finfo(dtype).max.astype(jnp.float32)
    return jnp.clip(value, -largest, largest).astype(dtype)


def group_codes(groups: jax.Array, scales: jax.Array, minima: jax.Array | None, f: Format) -> jax.Array:
    """Return the codes, int32, nearest to values f32 [N / rows, rows, G, any], under scales and minima as they are stored."""
    scale = number_of_scale(scales, f.scale)[..., None]
    if minima is not None:
        groups = groups - minima.astype(jnp.float32)[..., None]
    steps = jnp.where(scale == 0, 0, groups / jnp.where(scale == 0, 1, scale))
    if not isinstance(f.element, Integer):
        return element_codes(steps, f.element)
    least = 1 if f.bits == 8 and f.element.offset else 0  # -128 would have no counterpart
    return jnp.clip(jnp.rint(steps).astype(jnp.int32) + f.element.offset, least, 2**f.bits - 1)


def _best(groups, f, weights):
    """Return the scales and minima of least squared error."""

    def error(scales, minima):
        values = group_values(group_codes(groups, scales, minima, f), scales, minima, f)
        squares = (values - groups) ** 2
        return jnp.sum(squares if weights is None else squares * weights[None, None, None], (1, 3))[:, None]  # [N / rows, 1, G]

    def better(best, factor):
        found = _scales(groups, f, factor)
        wrong = error(*found)
        kept = jax.tree.map(lambda new, old: jnp.where(wrong < best[0], new, old), found, best[1])
        return (jnp.minimum(wrong, best[0]), kept), None

    first = _scales(groups, f, 1.0)
    (_, best), _ = jax.lax.scan(better, (error(*first), first), jnp.array(FACTORS, jnp.float32))
    return best
