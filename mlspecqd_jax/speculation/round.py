"""The one round that all levels share: draft, score, verify.

A round takes a draft, scores it in one pass of the level's model, and appends 1 to draft_len + 1 tokens, each an exact sample of
that model.

Notation: B batch, S buffer length, W window, G draft_len. `length` is the only position state: the token at length - 1 is *pending*
(chosen, not yet fed to the model); caches are indexed by absolute position and whatever lies beyond the length is neither read nor
trimmed. Rows that are finished go around with the others and change nothing.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mlspecqd_jax.speculation.buffers import filled, padded, read_at, write_at
from mlspecqd_jax.speculation.counts import count
from mlspecqd_jax.speculation.guide import Guide, class_of_lead
from mlspecqd_jax.speculation.judging import Judged, judge, kept
from mlspecqd_jax.speculation.protocols import (
    Ask,
    Draft,
    Drafter,
    Lent,
    Scored,
    Scorer,
    Sequences,
    check_proposal,
    experts_read,
)
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.state import State, is_unfinished, rolled_back
from mlspecqd_jax.speculation.widths import run_narrowest


class Verifier(Protocol):
    """What a round needs of the level that it is of."""

    @property
    def model(self) -> Scorer:
        """What it scores by."""

    @property
    def drafter(self) -> Drafter | None:
        """What drafts for it."""

    @property
    def draft_len(self) -> int:
        """G."""

    def all_widths(self, refeed: int) -> tuple[int, ...]:
        """Return the widths of the windows for which a pass is compiled, ascending."""

    def score(self, tokens: jax.Array, start: jax.Array, cache: Any) -> Scored:
        """Run one pass of the model over tokens [B, W] at positions start[r] + 0..W-1."""


class Proposed(NamedTuple):
    """What a level's drafter gave it."""

    draft: Draft
    below: Any  # the drafter's state
    cache: Any  # the level's own, which it lent


def run_round(
    level: Verifier,
    progress: State,
    limit: jax.Array,
    sampling: Sampling,
    limits: jax.Array,
    depth: int = 0,
    refeed: int = 0,
    guide: Guide | None = None,
) -> State:
    """Draft, score, verify: append 1 to draft_len + 1 tokens to every unfinished row.

    Args:
      level: whose exact samples to append.
      progress: where the rows stand.
      limit: int32 [B], the length at which a row is finished.
      sampling: the rows' settings.
      limits: int32 [D, B], how many tokens each level below may draft a round, outermost first.
      depth: how many levels above it there are.
      refeed: static, how many tokens before the pending one the cache lacks at most (`progress.fed`); they are fed too.
      guide: of the level's drafter, or None.
    """
    proposed = propose(level, progress, limit, sampling, limits, depth, refeed, guide)
    return verified(level, progress, proposed, limit, sampling, level.all_widths(refeed), depth, refeed)


def verified(
    level: Verifier,
    progress: State,
    proposed: Proposed,
    limit: jax.Array,
    sampling: Sampling,
    widths: tuple[int, ...],
    depth: int = 0,
    refeed: int = 0,
) -> State:
    """Score and verify what was proposed, in the narrowest of these windows that holds it (see `run_round`)."""
    unfinished = is_unfinished(progress, limit)
    length = progress.length
    start = _start(progress, refeed)
    sampling = sampling.of_round(length)
    draft, below, cache = proposed
    tokens = write_at(progress.tokens, length, draft.tokens)
    # A draft's row that is finished here may yet have to catch up; the target's has nothing to be fed.
    known = length + draft.length if depth else jnp.where(unfinished, length + draft.length, start)
    rows = jnp.max(known - start)

    one_by_one = len(level.all_widths(refeed)) > 1  # rows take time
    told = {"logprobs": progress.logprobs is not None, "leads": progress.classes is not None}

    def score(width, cache):
        n = min(width, level.draft_len + 1)
        window = padded(read_at(tokens, start, width), start, known)
        logits, cache, features = level.score(window, start, cache)

        def of_round(x):  # [B, W, ...] -> [B, n, ...]
            return read_at(x, length - 1 - start, n) if refeed else x[:, :n]

        judged = judge(of_round(logits), tokens, length, draft, sampling, depth, one_by_one=one_by_one, **told)
        return cache, (judged, None if progress.features is None else filled(of_round(features), level.draft_len + 1))

    nothing, before = (Judged.nothing(draft, **told), progress.features), experts_read(level.model, cache)
    cache, (judged, features) = run_narrowest(widths, rows, score, cache, nothing)
    verdict = judged.verdict
    appended, ended = kept(judged, length, limit, unfinished, sampling.stop_token_ids)
    broken = progress.broken
    if depth == 0:  # a draft's logits are replaced by lawful ones
        broken |= unfinished & (judged.lawful < appended)
        ended &= ~broken
        appended = jnp.minimum(appended, judged.lawful)
    there = (
        jnp.arange(level.draft_len + 1)[None, :] < appended[:, None]
    )  # what is made of padding is anything (C13), a state is not
    probs, logprobs, classes = progress.probs, progress.logprobs, progress.classes
    if probs is not None and verdict.probs is not None:
        probs = write_at(probs, length - progress.begin, verdict.probs)
    if logprobs is not None:
        logprobs = write_at(logprobs, length, jnp.where(there, judged.logprobs, 0))
    if classes is not None:
        classes = write_at(classes, length - progress.begin, class_of_lead(verdict.leads))
    length = length + appended
    return progress._replace(
        tokens=write_at(tokens, progress.length, jnp.where(there, verdict.tokens, 0)),
        length=length,
        ended=progress.ended | ended,
        broken=broken,
        cache=cache,
        features=features,
        scored_from=progress.length - 1,
        fed=length - 1,
        below=rolled_back(below, length - 1),
        counts=count(progress.counts, draft, verdict, appended, unfinished).passed(rows, before, experts_read(level.model, cache)),
        probs=probs,
        logprobs=logprobs,
        classes=classes,
    )


def propose(
    level: Verifier,
    progress: State,
    limit: jax.Array,
    sampling: Sampling,
    limits: jax.Array,
    depth: int = 0,
    refeed: int = 0,
    guide: Guide | None = None,
) -> Proposed:
    """Ask the level's drafter, if there is one (see `run_round`)."""
    unfinished = is_unfinished(progress, limit)
    sampling = sampling.of_round(progress.length)
    if level.drafter is None:
        return Proposed(Draft.empty(unfinished.shape[0], sampling), progress.below, progress.cache)
    # The token after the draft comes from the verifier, so one less than what is missing is of use.
    useful = jnp.where(unfinished, jnp.clip(limit - progress.length - 1, 0, level.draft_len), 0)
    ask = Ask(
        sequences=Sequences(progress.tokens, progress.length),
        wanted=jnp.minimum(useful, limits[0]),
        limits=limits[1:],
        lent=Lent(progress.cache, progress.features, progress.scored_from),
        draft_len=level.draft_len,
        depth=depth + 1,
        fed=_start(progress, refeed),
        refeed=refeed,
        guide=guide,
    )
    proposal = level.drafter.propose(progress.below, ask, sampling)
    draft, below, lent = check_proposal(proposal, level.drafter, ask, sampling)
    return Proposed(draft, below, lent.cache)


def _start(progress: State, refeed: int) -> jax.Array:
    """Return the position of the first token of each row's window, int32 [B]."""
    return jnp.clip(progress.fed, progress.length - 1 - refeed, progress.length - 1)
