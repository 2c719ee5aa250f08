"""`Counts`: what happened to the drafts that a level judged, row by row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.speculation.buffers import SLACK, filled
from mlspecqd_jax.speculation.protocols import Draft
from mlspecqd_jax.speculation.verification import Verdict


class Counts(NamedTuple):
    """What happened to the drafts that a level judged, over unfinished rows."""

    rounds: jax.Array  # int32 [B]
    drafted: jax.Array  # int32 [B]
    accepted: jax.Array  # int32 [B, G], by position in the draft
    judged: jax.Array  # int32 [B, G]
    by_class: jax.Array  # int32 [2, B, 8, 2], accepted and judged by source and class (of `guide`), where drafts have classes
    by_rows: jax.Array  # int32 [SLACK + 1], passes of the level's model by how many rows were in use (prefill apart)
    in_vain: jax.Array  # int32 [], plain rounds of the target before which a draft was asked for
    experts: jax.Array | None = None  # f32 [], of how many experts a layer read the weights in these, where the model tells

    @property
    def passes(self) -> jax.Array:
        """Return how many passes of the level's model there were, int32 []."""
        return self.by_rows.sum()

    def passed(self, rows: jax.Array, before: jax.Array | None = None, after: jax.Array | None = None) -> "Counts":
        """Add a pass with so many rows in use, int32 []; before and after it `protocols.experts_read` was this."""
        counts = self._replace(by_rows=self.by_rows.at[rows].add(1))
        if self.experts is None or before is None or after is None:
            return counts
        return counts._replace(experts=self.experts + (after - before))

    def asked_in_vain(self, so: jax.Array) -> "Counts":
        """Add a round in which nothing was drafted although it was asked for, if it was so, bool []."""
        return self._replace(in_vain=self.in_vain + so.astype(jnp.int32))

    @staticmethod
    def zeros(batch: int, draft_len: int, experts: bool = False) -> "Counts":
        """Return the counts before the first round, those of experts where the model tells."""
        zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
        drafts = (batch, draft_len)
        shapes = (batch,), (batch,), drafts, drafts, (2, batch, 8, 2), (SLACK + 1,), ()
        # None of them twice: a program that is given a state may write to each.
        return Counts(*map(zeros, shapes), experts=jnp.zeros(()) if experts else None)


def count(counts: Counts, draft: Draft, verdict: Verdict, appended: jax.Array, unfinished: jax.Array) -> Counts:
    """Add what a round did to a draft.

    Args:
      counts: before the round.
      draft: what was judged, of as many tokens as the level's drafts have or fewer.
      verdict: how.
      appended: int32 [B], tokens that each row kept.
      unfinished: bool [B], which rows the round was for.
    """
    g = jnp.arange(draft.tokens.shape[1])[None, :]
    # A draft cut by a stop token or a limit counts what was kept of it, any other counts whole.
    whole = appended == verdict.accepted + 1
    kept = jnp.where(unfinished, jnp.where(whole, draft.length, jnp.minimum(draft.length, appended)), 0)
    accepted = g < jnp.minimum(kept, verdict.accepted)[:, None]
    judged = g < jnp.minimum(kept, verdict.accepted + 1)[:, None]
    by_class = counts.by_class
    if draft.classes is not None:
        both = jnp.stack([accepted, judged], axis=-1).astype(jnp.int32)  # [B, G, 2]
        here = jax.nn.one_hot(draft.classes, by_class.shape[2], dtype=jnp.int32)  # [B, G, 8]
        by_class = by_class.at[draft.source].add(jnp.einsum("bgc,bgx->bcx", here, both))
    return counts._replace(
        by_class=by_class,
        rounds=counts.rounds + unfinished.astype(jnp.int32),
        drafted=counts.drafted + kept,
        accepted=counts.accepted + filled(accepted.astype(jnp.int32), counts.accepted.shape[1]),
        judged=counts.judged + filled(judged.astype(jnp.int32), counts.judged.shape[1]),
    )
