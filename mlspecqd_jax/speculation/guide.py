"""`Guide`: what the drafts of a level are worth, so that drafting may stop where it no longer pays.

One principle decides everything: expected tokens times what a token is worth, less the time that they take. A token of the target
is worth the time in which it makes one; a token of a draft what its verifier would take to make it, or what it still gives the
levels above, if that is less. Chances of acceptance come from classes of drafted tokens: of a model's by how far the chosen logit,
noise included, was ahead of the next; of look-up's by how many tokens matched.

Times are in passes of plain decoding. Notation: B batch, L levels from the judge downwards, R rows of a window, G draft_len.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.counts import Counts

LOOKUP, MODEL = 0, 1  # the sources of a draft
CLASSES = 8
LEADS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # between the classes of a model's tokens


class Guide(NamedTuple):
    """What a drafter is told of its judge, and of the levels from there downwards."""

    times: jax.Array  # f32 [L, SLACK + 1], of a pass, by rows in use
    accept: jax.Array  # f32 [L, 2, B, CLASSES], the chance that a level accepts a token, by source and class
    mean: jax.Array  # f32 [L, 2, B], the same of any token
    pace: jax.Array  # f32 [L, 2], tokens and time of a round of each level
    weight: jax.Array  # f32 [B], of the rows; their sum is 1
    worth: jax.Array  # f32 [], of a token that the judge appends, in time
    after: jax.Array  # f32 [SLACK + 1], the time of what must follow a draft, by its length: passes of the judge and those above
    room: jax.Array  # f32 [], the time that the draft and what must follow may take
    retry: jax.Array  # bool [], whether a model is to draft even if that does not seem to pay
    asks: jax.Array  # bool [], whether to ask for a draft; asking takes time too
    rest: jax.Array  # int32 [], else, how many plain rounds may go by until the control is asked again

    @property
    def each(self) -> jax.Array:
        """Return the time that a token of the level below the judge takes, f32 []."""
        return self.pace[1, 1] / self.pace[1, 0]


def class_of_lead(lead: jax.Array) -> jax.Array:
    """Return the class of a token whose logit was so far ahead, int32."""
    edges = jnp.asarray(LEADS).reshape((1,) * lead.ndim + (-1,))
    return jnp.sum((lead[..., None] > edges).astype(jnp.int32), axis=-1)


def class_of_match(matched: jax.Array, draft_len: int) -> jax.Array:
    """Return the classes, int32 [B, G], of what followed n matched tokens [B]: the k-th from 0 has n + k before it."""
    return jnp.clip(matched[:, None] + jnp.arange(draft_len)[None, :], 1, CLASSES) - 1


def chances(guide: Guide, source: int, classes: jax.Array) -> jax.Array:
    """Return the chance that the judge accepts each token of these classes [B, G], f32 [B, G]."""
    return jnp.take_along_axis(guide.accept[0, source], classes, axis=1)


def surviving(chance: jax.Array, length: jax.Array) -> jax.Array:
    """Return the chance that each token and all before it are accepted, of `length` [B] tokens with these chances [B, G]."""
    return jnp.where(jnp.arange(chance.shape[1])[None, :] < length[:, None], jnp.cumprod(chance, axis=1), 0.0)


def best_length(
    guide: Guide, survive: jax.Array, each: jax.Array | float, once: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Return what the best draft is worth, less its time, and its length of at least 1: f32 [], int32 []; -inf where none can be.

    Args:
      guide: of the judge.
      survive: f32 [B, G], of `surviving`.
      each: time of a drafted token.
      once: time that drafting takes besides.
    """
    length = jnp.arange(1, survive.shape[1] + 1)
    gained = jnp.cumsum(jnp.sum(guide.weight[:, None] * survive, axis=0))
    drafting = length.astype(jnp.float32) * each + once
    value = guide.worth * (1 + gained) - guide.times[0, length + 1] - drafting
    possible = (drafting + guide.after[length] <= guide.room) & (jnp.max(survive, axis=0) > 0)
    value = jnp.where(possible, value, -jnp.inf)
    best = jnp.argmax(value)
    return value[best], (best + 1).astype(jnp.int32)


def undrafted(guide: Guide) -> jax.Array:
    """Return what a round without a draft is worth, less its time, f32 []."""
    return guide.worth - guide.times[0, 1]


def another_round_pays(guide: Guide, alive: jax.Array, drafted: jax.Array, spent: jax.Array) -> jax.Array:
    """Return whether a drafter that is a level should run a round more, bool [].

    Args:
      guide: of its judge.
      alive: f32 [B], the chance that all that it drafted so far is accepted; 0 for rows that want no more.
      drafted: int32 [], how many tokens the longest row has.
      spent: f32 [], the time that these took.
    """
    tokens = jnp.maximum(jnp.round(guide.pace[1, 0]), 1)
    mean = guide.mean[0, MODEL]
    gained = jnp.sum(guide.weight * alive * mean * (1 - mean**tokens) / jnp.maximum(1 - mean, 1e-6))
    longer = jnp.minimum(drafted + tokens.astype(jnp.int32), SLACK - 1)
    time = guide.pace[1, 1] + guide.times[0, longer + 1] - guide.times[0, drafted + 1]
    return ((drafted == 0) | (guide.worth * gained > time)) & affordable(guide, drafted, spent)


def affordable(guide: Guide, drafted: jax.Array, spent: jax.Array) -> jax.Array:
    """Return whether there is room for a pass more of the drafter over one row, bool []."""
    return spent + guide.times[1, 1] + guide.after[jnp.minimum(drafted + 1, SLACK)] <= guide.room


def for_its_drafter(guide: Guide, alive: jax.Array, drafted: jax.Array, spent: jax.Array) -> Guide:
    """Return the guide of a level's own drafter, given that of the level; the arguments are those of `another_round_pays`."""
    kept = jnp.sum(guide.weight * alive * guide.mean[0, MODEL])
    longer = jnp.minimum(drafted + 1 + jnp.arange(SLACK + 1), SLACK)
    rows = jnp.minimum(1 + jnp.arange(SLACK + 1), SLACK)
    return guide._replace(
        times=guide.times[1:],
        accept=guide.accept[1:],
        mean=guide.mean[1:],
        pace=guide.pace[1:],
        worth=jnp.minimum(guide.each, guide.worth * kept),
        after=guide.times[1, rows] + guide.after[longer],
        room=guide.room - spent,
        retry=jnp.bool_(False),
    )


def modelled(times: jax.Array, counts: tuple[Counts, ...]) -> jax.Array:
    """Return the time of all passes that were counted, f32 [], given the times [L, SLACK + 1] of each of these levels."""
    passes = jnp.stack([each.by_rows for each in counts]).astype(jnp.float32)
    return jnp.sum(times[: len(counts)] * passes)
