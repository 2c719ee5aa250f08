"""`Counts`: what happened to the drafts that a level judged, row by row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.speculation.buffers import SLACK
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

    @staticmethod
    def zeros(batch: int, draft_len: int, experts: bool = False) -> "Counts":
        """Return the counts before the first round, those of experts where the model tells."""
        zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
        drafts = (batch, draft_len)
        rows = zeros((batch,)), zeros((batch,)), zeros(drafts), zeros(drafts), zeros((2, batch, 8, 2))
        return Counts(*rows, zeros((SLACK + 1,)), jnp.zeros(()) if experts else None)


def count(counts: Counts, draft: Draft, verdict: Verdict, appended: jax.Array, unfinished: jax.Array) -> Counts:
    """Add what a round did to a draft.

    Args:
      counts: before the round.
      draft: what was judged.
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
        accepted=counts.accepted + accepted.astype(jnp.int32),
        judged=counts.judged + judged.astype(jnp.int32),
    )
