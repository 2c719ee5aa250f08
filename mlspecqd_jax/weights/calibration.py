"""`calibrated`: a weight rounded column by column, each to make up for the errors of those before it, as its inputs want it.

Source: GPTQ (arXiv 2210.17323), of which these are the codes, found without an inverse. With H the sum of x x^T over inputs x, what
errors e [K] of a row of the weight do to its outputs is e^T H e in all. Of the factor H = R R^T, R upper triangular,

    (R^T e)[j] = R[j, j] (e[j] + sum over l < j of T[l, j] e[l]),  T[l, j] = R[l, j] / R[j, j]

so that column j, once those before it are rounded, is best rounded from w[j] + sum T[l, j] e[l]. (This is Babai's nearest plane;
GPTQ spreads each error over the columns to come by a Cholesky factor of the inverse of H, and comes to the same numbers.)

Notation: N outputs, K contracted, K32 is K rounded up to whole 32s. Columns are kept as rows, [K, N], for memory's sake.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.weights import mx, scaled
from mlspecqd_jax.weights.cast import SEARCH, check_scale_rule
from mlspecqd_jax.weights.formats import SCALE_DTYPES, STEP, Format, format_of
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import group_values

DAMPINGS = (0.01, 0.1, 1.0)  # of the mean of H's diagonal, added to it; the first is GPTQ's
WIDTH = 128  # columns that are made up for at once, where a whole row shares its scale
ELEMENTS = 2**26  # of a weight that are rounded at once
HIGHEST = jax.lax.Precision.HIGHEST


class Influence(NamedTuple):
    """What inputs say of the columns that they multiply."""

    spread: jax.Array  # T, f32 [K, K], strictly upper triangular: how much of the error of column l is made up for in column j
    weights: jax.Array  # R[j, j]^2, f32 [K], the largest 1: what is left of the square of a column's error counts so much


def influence(h: jax.Array) -> Influence | None:
    """Return what second moments say of each column.

    Args:
      h: f32 [K, K], the sum of x x^T over inputs. One that is always zero stays by itself.

    Returns:
      None where h is not finite or has no factor, however damped.
    """
    for damping in DAMPINGS:
        found, is_finite = _influence(h, damping)
        if is_finite:
            return found
    return None


@jax.jit
def _influence(h, damping):
    h = h + damping * jnp.mean(jnp.diagonal(h)) * jnp.eye(len(h), dtype=h.dtype)
    # The factor that is lower triangular from the other end.
    r = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    diagonal = jnp.diagonal(r)
    found = Influence(jnp.triu(r / diagonal[None], 1), diagonal**2 / jnp.max(diagonal**2))
    return found, jnp.all(jnp.isfinite(found.spread))


def calibrated(w: jax.Array, found: Influence, format: str = "mxfp4", scale_rule: str = "floor") -> QuantizedArray:
    """Round a weight to a format with each column making up for those before it; one without influence as `cast.quantize` does.

    A group's scale is found when its turn comes, from what its columns have become; one of a whole row, and the one of the whole
    weight, before all. A search for it by squared error weighs squares.

    Args:
      w: [N, K], finite.
      found: of `influence`.
      format: a name of `formats.FORMATS`.
      scale_rule: of `cast.quantize`.

    Raises:
      InputError: one sentence on the format, the rule, or a weight that is not finite.
    """
    f = format_of(format)
    check_scale_rule(scale_rule, format)
    n, k = w.shape
    if not jnp.all(jnp.isfinite(w)):
        raise InputError(f"a weight of shape {[n, k]} holds NaN or infinity and cannot be quantized; use an intact checkpoint")
    unit = scaled.tensor_scale_of(w.astype(jnp.float32), f) if f.scale == "e4m3" else None
    rows = max(ELEMENTS // k // f.rows, 1) * f.rows  # at once, since they know nothing of each other
    parts = [_rounded(w[first : first + rows], *found, unit, f, scale_rule) for first in range(0, n, rows)]
    arrays = {role: jnp.concatenate([part[role] for part in parts]) for role in parts[0]}
    return QuantizedArray(arrays | ({} if unit is None else {"tensor_scale": unit[None]}), (n, k), format)


@functools.partial(jax.jit, static_argnames=("f", "scale_rule"))
def _rounded(w, t, weights, unit, f: Format, scale_rule: str):
    """The arrays of `QuantizedArray` by role, but for the number of the whole weight, `unit`."""
    n, k = w.shape
    w = w.astype(jnp.float32)
    w = w if unit is None else w / unit
    width, filled = f.group or WIDTH, k + -k % STEP
    whole = filled + -filled % width
    weights = jnp.pad(weights, (0, whole - k), mode="edge")
    fixed = None if f.group else _scales(scaled.grouped(w, f)[:, 0, 0].T, weights[:filled], f, scale_rule)
    # What is added is as the plain casts have it: zeros in MX, the last column again in others.
    mode = "constant" if f.scale == "e8m0" else "edge"
    columns = jnp.pad(jnp.pad(w, ((0, -n % f.rows), (0, 0))), ((0, 0), (0, whole - k)), mode=mode).T  # [K', N']
    t = jnp.pad(t, (0, whole - k))

    def step(carry, i):  # of errors f32 and codes uint8, each [K', N']
        first = i * width
        here = jax.lax.dynamic_slice_in_dim(columns, first, width)
        ours = jax.lax.dynamic_slice_in_dim(t, first, width, axis=1)  # [K', width]
        moved, within = here + jnp.matmul(ours.T, carry[0], precision=HIGHEST), jax.lax.dynamic_slice_in_dim(ours, first, width)
        found = fixed
        if found is None:
            wanted = _before_rounding(here, moved, within)
            if mode == "edge" and k % width:
                is_filler = (i == k // width) & (jnp.arange(width) >= k % width)
                wanted = jnp.where(is_filler[:, None], wanted[k % width - 1][None], wanted)
            found = _scales(wanted, jax.lax.dynamic_slice_in_dim(weights, first, width), f, scale_rule)
        new = _round_columns(here, moved, within, found, f)
        carry = tuple(jax.lax.dynamic_update_slice_in_dim(old, part, first, axis=0) for old, part in zip(carry, new, strict=True))
        return carry, () if fixed else found

    start = jnp.zeros_like(columns), jnp.zeros(columns.shape, jnp.uint8)
    (_, codes), found = jax.lax.scan(step, start, jnp.arange(whole // width))
    codes = codes.T[:n, :filled].astype(jnp.int32)
    codes = jnp.where(jnp.arange(filled) < k, codes, getattr(f.element, "offset", 0))
    scales, minima = (x if x is None else x[:, :, 0].T for x in found) if fixed is None else (fixed[0], None)
    stored = {"codes": mx.stored_codes(codes, f), "scales": scales.astype(SCALE_DTYPES[f.scale])}
    return stored | ({} if minima is None else {"minima": minima})


def _before_rounding(here, moved, t):
    """Return what a block's columns [width, N'] would best be if none of them were rounded; arguments as of `_round_columns`.

    Column j is then x[j] = moved[j] + sum over l < j of T[l, j] (here[l] - x[l]).
    """
    mixed = moved + jnp.matmul(t.T, here, precision=HIGHEST)
    return jax.scipy.linalg.solve_triangular(jnp.eye(len(t), dtype=t.dtype) + t.T, mixed, lower=True, unit_diagonal=True)


def _round_columns(here, moved, t, found, f: Format):
    """Round a block's columns [width, N'], given what they were and what those before it made of them; its own t [width, width].

    Returns:
      (errors f32, codes uint8), each [width, N'].
    """

    def round_column(j, carry):
        errors, codes = carry
        wanted = moved[j] + jnp.matmul(t[:, j], errors, precision=HIGHEST)
        code, value = _nearest(wanted, *found, f)
        return errors.at[j].set(here[j] - value), codes.at[j].set(code.astype(jnp.uint8))

    return jax.lax.fori_loop(0, len(here), round_column, (jnp.zeros_like(here), jnp.zeros(here.shape, jnp.uint8)))


def _scales(columns, weights, f: Format, scale_rule: str):
    """The scales of a group's columns [group, N'] whose squares weigh so much, [N' / rows, 1], and its minima or None."""
    if f.scale == "e8m0":
        return mx.block_scales(columns.T, f, scale_rule, weights), None
    groups = columns.T.reshape(-1, f.rows, 1, len(columns))
    scales, minima = scaled.group_scales(groups, f, scale_rule == SEARCH, weights)
    return scales[:, 0], None if minima is None else minima[:, 0]


def _nearest(wanted, scales, minima, f: Format):
    """The codes, int32 [N'], nearest to the numbers wanted of a column, and what they stand for."""
    if f.scale == "e8m0":
        codes = mx.block_codes(wanted, scales[:, 0], f)
        return codes, mx.block_values(codes, scales[:, 0], f)
    scales, minima = scales[:, None], None if minima is None else minima[:, None]
    codes = scaled.group_codes(wanted.reshape(-1, f.rows, 1, 1), scales, minima, f)
    return codes.ravel(), group_values(codes, scales, minima, f).ravel()
