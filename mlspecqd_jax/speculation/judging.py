"""From the logits of a window to what a round appends: adjusted, verified, and cut where text ends.

Notation: B batch, W rows of logits, G draft_len, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.speculation.buffers import filled
from mlspecqd_jax.speculation.choosing import adjust, log_probability
from mlspecqd_jax.speculation.protocols import Draft
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.verification import Verdict, verify


class Judged(NamedTuple):
    """What a pass makes of a draft, as wide as a whole draft and a token."""

    verdict: Verdict
    lawful: jax.Array  # int32 [B], how many leading rows of logits can be chosen from
    logprobs: jax.Array | None  # f32 [B, G + 1], of the verdict's tokens, if asked for

    @staticmethod
    def nothing(draft: Draft, *, logprobs: bool, leads: bool) -> "Judged":
        """Return what is judged before there is a pass, in the shapes of what is judged of a draft."""
        none = jnp.zeros_like(draft.length)
        tokens = jnp.zeros((draft.tokens.shape[0], draft.tokens.shape[1] + 1), jnp.int32)
        probs = None if draft.probs is None else filled(draft.probs, tokens.shape[1])
        zeros = tokens.astype(jnp.float32)
        return Judged(Verdict(tokens, none, probs, zeros if leads else None), none, zeros if logprobs else None)


def judge(
    logits: jax.Array,
    tokens: jax.Array,
    position: jax.Array,
    draft: Draft,
    sampling: Sampling,
    depth: int,
    *,
    logprobs: bool,
    leads: bool,
    one_by_one: bool = False,
):
    """Verify a draft by the logits of a window.

    Args:
      logits: f32 [B, W, any], of the tokens from `position` on; W - 1 is at least the draft's length, and at most G.
      tokens: int32 [B, S], the draft in place.
      position: int32 [B], of the first drafted token.
      draft: what is judged.
      sampling: the rows' settings.
      depth: of the level that judges; a draft's logits are made lawful.
      logprobs: whether to hand up the log-probabilities of the verdict's tokens.
      leads: whether to hand up by how much each of them was ahead.
      one_by_one: of `verify`.

    Returns:
      Judged.
    """
    rows, whole = logits.shape[1], draft.tokens.shape[1] + 1
    logits = _fitted(logits, sampling.vocab_size)
    adjusted = adjust(logits, tokens, position[:, None] + jnp.arange(rows)[None, :], sampling)
    probs = None if draft.probs is None else draft.probs[:, : rows - 1]
    seen = draft._replace(tokens=draft.tokens[:, : rows - 1], probs=probs)
    verdict = verify(_lawful(adjusted) if depth else adjusted, seen, position, sampling, depth, leads, one_by_one)
    lawful = jnp.full_like(position, rows) if depth else _lawful_rows(adjusted, verdict, sampling)
    return Judged(
        jax.tree.map(lambda part: filled(part, whole) if part.ndim > 1 else part, verdict),
        lawful,
        filled(log_probability(logits, verdict.tokens), whole) if logprobs else None,
    )


def kept(judged: Judged, length: jax.Array, limit: jax.Array, unfinished: jax.Array, stop_token_ids: jax.Array):
    """Return how many of the verdict's tokens each row keeps, int32 [B], and whether the last kept one is a stop token."""
    verdict = judged.verdict
    g = jnp.arange(verdict.tokens.shape[1])[None, :]
    stops = jnp.any(verdict.tokens[..., None] == stop_token_ids[None, None, :], axis=-1)
    to_stop = jnp.min(jnp.where(stops, g + 1, verdict.tokens.shape[1] + 1), axis=1)
    n = jnp.minimum(jnp.minimum(verdict.accepted + 1, limit - length), to_stop)
    n = jnp.where(unfinished, n, 0)
    return n, unfinished & (n == to_stop)


def _fitted(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Cut or pad a draft's logits with -inf to the target's vocabulary: models of one tokenizer pad it differently."""
    missing = max(vocab_size - logits.shape[-1], 0)
    return jnp.pad(logits[..., :vocab_size], ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)


def _lawful(logits: jax.Array) -> jax.Array:
    """Replace each row that nothing can be drawn from (NaN, +inf, or -inf throughout) by certainty of token 0.

    A broken draft must still hand up what it drew from; that it is never accepted costs speed alone.
    """
    usable = jnp.all(logits < jnp.inf, axis=-1) & jnp.any(logits > -jnp.inf, axis=-1)
    certain = jnp.where(jnp.arange(logits.shape[-1]) == 0, 0.0, -jnp.inf)
    return jnp.where(usable[..., None], logits, certain[None, None, :])


def _lawful_rows(logits: jax.Array, verdict: Verdict, sampling: Sampling) -> jax.Array:
    """Return int32 [B], how many leading rows of logits [B, W, V] can be chosen from: no NaN, no +inf, not -inf throughout.

    NaN and +inf come before every depth in an argmax, so greedy tokens tell of them without another pass over V.
    """

    def of_chosen(logits):
        return jnp.take_along_axis(logits, verdict.tokens[..., None], axis=-1)[..., 0]

    def of_all(logits):
        return jnp.max(logits, axis=-1)

    if sampling.synthetic_acceptance is not None:
        largest = of_all(logits)
    else:
        largest = jax.lax.cond(jnp.any(sampling.temperature > 0), of_all, of_chosen, logits)
    return jnp.sum(jnp.cumprod(jnp.isfinite(largest).astype(jnp.int32), axis=1), axis=1)
