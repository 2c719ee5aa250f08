"""`route`: which experts positions are given to, and with what factors, from the logits of a router, in float32.

A position's result is a function of its own logits alone, by operations in one order (`folds`), so that it has the same bits in any
window and batch.

Notation: T positions, E experts, C chosen of them, G groups.
"""

import jax
import jax.numpy as jnp

from mlspecqd_jax.folds import ordered_softmax
from mlspecqd_jax.network.config import Router


def route(logits: jax.Array, bias: jax.Array | None, router: Router) -> tuple[jax.Array, jax.Array]:
    """Choose experts by their scores; of equal ones that of the lower number goes first.

    Args:
      logits: f32 [T, E].
      bias: f32 [E], added to the scores for the choice alone, or None.
      router: the rule.

    Returns:
      (experts int32 [T, C], the best first; their factors f32 [T, C]).
    """
    scores = _scores(logits, router)
    wanted = scores if bias is None else scores + bias[None]
    wanted = wanted if router.groups == 1 else _of_best_groups(wanted, router)
    _, experts = jax.lax.top_k(wanted, router.chosen)
    factors = jnp.take_along_axis(scores, experts, axis=-1)
    if router.scores.endswith(" of chosen"):
        factors = ordered_softmax(factors) if router.scores == "softmax of chosen" else jax.nn.sigmoid(factors)
    if router.normed:
        factors = factors / jnp.maximum(_total(factors), router.least_sum)
    return experts.astype(jnp.int32), factors if router.factor == 1 else factors * router.factor


def _scores(logits, router):
    if router.scores == "softmax":
        return ordered_softmax(logits)
    return jax.nn.sigmoid(logits) if router.scores == "sigmoid" else logits


def _of_best_groups(scores, router):
    """Scores [T, E], -inf outside of the groups whose best experts have the largest sums."""
    groups = scores.reshape(len(scores), router.groups, -1)  # [T, G, E / G]
    best = jax.lax.top_k(groups, min(router.group_best, groups.shape[-1]))[0]
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), router.groups_chosen)
    kept = jnp.any(chosen[..., None] == jnp.arange(router.groups)[None, None], axis=1)  # [T, G]
    return jnp.where(kept[..., None], groups, -jnp.inf).reshape(scores.shape)


def _total(factors):
    """The sum over the last axis of factors [T, C], in order, as [T, 1]."""
    total = factors[:, :1]
    for i in range(1, factors.shape[1]):
        total = total + factors[:, i : i + 1]
    return total
