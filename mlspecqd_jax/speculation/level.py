"""The recursion: levels, each a model and what drafts for it, and the one round that all of them share.

A round (`run_round`) takes a draft, scores it in one pass of the level's model, and appends 1 to draft_len + 1 tokens, each an
exact sample of that model. What a level puts out is therefore an exact sample of its own model whatever drafts below it, so a
level can itself draft for the level above: `Level.propose` runs rounds until the draft is full (ML-SpecQD, arXiv 2503.13565, for
any depth). Plain decoding is the level without a drafter: its draft is empty and its window is the pending token.

Notation: B batch, S buffer length, W window, G draft_len, V vocabulary. `length` is the only position state: the token at
length - 1 is *pending* (chosen, not yet fed to the model); caches are indexed by absolute position and whatever lies beyond the
length is neither read nor trimmed. Rows that are finished go around with the others and change nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.speculation.buffers import padded, read_at, write_at
from mlspecqd_jax.speculation.choosing import adjust, log_probability
from mlspecqd_jax.speculation.counts import Counts, count
from mlspecqd_jax.speculation.protocols import (
    Ask,
    Draft,
    Drafter,
    Lent,
    Scored,
    Scorer,
    Sequences,
    check_proposal,
    check_scored,
)
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.state import DrafterState, State, is_unfinished
from mlspecqd_jax.speculation.verification import Verdict, verify

SLACK = 64  # buffer positions beyond the last token, for the window of one round of any level


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """A model, its parameters, and what drafts for it; a pytree whose leaves are the parameters of all levels below.

    Every level but the outermost is a `Drafter`.
    """

    model: Scorer = dataclasses.field(metadata={"static": True})
    params: Any
    drafter: Drafter | None = None
    draft_len: int = dataclasses.field(metadata={"static": True}, default=0)
    # Every window is rounded up to a multiple of this many rows, so that stacks of any draft_len compute a row alike (exactness).
    window_multiple: int = dataclasses.field(metadata={"static": True}, default=1)
    # Whether to read the verifier's cache and to write the drafted positions there, where verification overwrites them.
    share_cache: bool = dataclasses.field(metadata={"static": True}, default=False)

    def __post_init__(self):
        if (self.drafter is None) != (self.draft_len == 0) or self.draft_len < 0:
            raise InputError(
                f"draft_len is {self.draft_len} {'without' if self.drafter is None else 'with'} a drafter; "
                "give both, or neither for plain decoding"
            )
        for depth, level in enumerate(self.levels):
            if level.window(depth) > SLACK:
                raise InputError(
                    f"draft_len {level.draft_len} needs a window of {level.window(depth)} positions; at most {SLACK} are supported"
                )
        if isinstance(self.drafter, Level) and self.drafter.share_cache and self.drafter.model != self.model:
            raise InputError("a drafter can share its verifier's cache only if it is the same model with other weights")

    @property
    def levels(self) -> "tuple[Level, ...]":
        """This level and those below it, outermost first."""
        return (self, *(self.drafter.levels if isinstance(self.drafter, Level) else ()))

    @property
    def name(self) -> str:
        """What it is called where nothing better is known: the type of its model."""
        return type(self.model).__name__

    @property
    def must_follow(self) -> bool:
        """Whether this level, as a drafter, or what drafts for it keeps a cache that must be fed what was appended above."""
        return not self.share_cache or (self.drafter is not None and self.drafter.must_follow)

    @property
    def uses_features(self) -> bool:
        """Whether its verifier is to lend it features: its drafter's, where prompts are fed to the verifier alone."""
        return self.share_cache and self._lends_features

    @property
    def draft_lens(self) -> tuple[int, ...]:
        """The draft_len of every drafter, outermost first."""
        return tuple(level.draft_len for level in self.levels if level.drafter is not None)

    @property
    def _lends_features(self) -> bool:
        return self.drafter is not None and self.drafter.uses_features

    def window(self, refeed: int = 0) -> int:
        """Return the number of positions that one round feeds to the model, `refeed` of them for the second time."""
        return -(-(refeed + self.draft_len + 1) // self.window_multiple) * self.window_multiple

    def score(self, tokens: jax.Array, start: jax.Array, cache: Any) -> Scored:
        """Run one pass of the model over tokens [B, W] at positions start[r] + 0..W-1, and check what it returns."""
        features = self._lends_features
        return check_scored(self.model(self.params, tokens, start, cache, features=features), self.model, tokens, features)

    def init(self, batch: int, slots: int) -> DrafterState:
        """Return the empty caches of this level and those below (see `Drafter`)."""
        below = None if self.drafter is None else self.drafter.init(batch, slots)
        cache = None if self.share_cache else self.model.init_cache(self.params, batch, slots)
        counts = Counts.zeros(batch, self.draft_len)
        return DrafterState(cache, self._no_features(batch, slots), jnp.zeros((batch,), jnp.int32), below, counts)

    def feed(self, state: DrafterState, tokens: jax.Array, start: jax.Array, lent: Lent) -> DrafterState:
        """Feed a piece of the prompts to every cache of this level and those below (see `Drafter`)."""
        if self.share_cache:  # what its verifier was fed is in the cache already
            mine = lent
        else:
            scored = self.score(tokens, start, state.cache)
            mine = Lent(scored.cache, scored.features, start)
            state = state._replace(cache=scored.cache)
        if self.drafter is None:
            return state
        return state._replace(below=self.drafter.feed(state.below, tokens, start, mine))

    def propose(self, state: DrafterState, ask: Ask, sampling: Sampling) -> tuple[Draft, DrafterState, Lent]:
        """Run rounds until every row has wanted[r] tokens or drafted a stop token (see `Drafter`)."""
        tokens, length = ask.sequences
        batch = length.shape[0]
        probs = jnp.zeros((batch, ask.draft_len, sampling.vocab_size)) if sampling.rule == "rejection" else None
        limit = length + ask.wanted
        begun = State(
            tokens=tokens,
            length=length,
            begin=length,
            ended=jnp.zeros((batch,), bool),
            broken=jnp.zeros((batch,), bool),
            cache=ask.lent.cache if self.share_cache else state.cache,
            features=state.features,
            scored_from=state.scored_from,
            below=state.below,
            counts=state.counts,
            probs=probs,
            logprobs=None,
        )

        def run(progress, refeed):
            return run_round(self, progress, limit, sampling, ask.limits, ask.depth, refeed)

        refeed = ask.refeed if self.share_cache else ask.depth
        if refeed:
            begun = run(begun, refeed)

        def more(progress):
            # A cache of its own, here or below, must catch up in every round of the verifier, also where no draft is of use.
            first = self.must_follow & (progress.counts.passes == state.counts.passes)
            return first | jnp.any(is_unfinished(progress, limit))

        end = jax.lax.while_loop(more, lambda progress: run(progress, 0), begun)
        draft = Draft(read_at(end.tokens, end.begin, ask.draft_len), end.probs, end.length - end.begin)
        state = DrafterState(None if self.share_cache else end.cache, end.features, end.scored_from, end.below, end.counts)
        return draft, state, ask.lent._replace(cache=end.cache) if self.share_cache else ask.lent

    def _no_features(self, batch: int, slots: int) -> jax.Array | None:
        """Return the features of a round before there was one: zeros [B, draft_len + 1, F], or None where nobody uses them."""
        if not self._lends_features:
            return None

        def one_pass():
            rows = jnp.zeros((batch, self.draft_len + 1), jnp.int32)
            cache = self.model.init_cache(self.params, batch, slots)
            return self.score(rows, rows[:, 0], cache).features

        found = jax.eval_shape(one_pass)
        return jnp.zeros(found.shape, found.dtype)


def run_round(
    level: Level, progress: State, limit: jax.Array, sampling: Sampling, limits: jax.Array, depth: int = 0, refeed: int = 0
) -> State:
    """Draft, score, verify: append 1 to draft_len + 1 tokens to every unfinished row.

    Args:
      level: whose exact samples to append.
      progress: where the rows stand.
      limit: int32 [B], the length at which a row is finished.
      sampling: the rows' settings.
      limits: int32 [D, B], how many tokens each level below may draft a round, outermost first.
      depth: how many levels above it there are.
      refeed: how many tokens before the pending one to feed again (fewer where a row has fewer).
    """
    unfinished = is_unfinished(progress, limit)
    length, rows = progress.length, level.draft_len + 1
    draft, below, cache = _drafted(level, progress, limit, unfinished, sampling, limits, depth, refeed)
    tokens = write_at(progress.tokens, length, draft.tokens)
    start = jnp.maximum(length - 1 - refeed, 0)
    # A draft's row that is finished here may yet have to catch up; the target's has nothing to be fed.
    known = length + draft.length if depth else jnp.where(unfinished, length + draft.length, 0)
    window = padded(read_at(tokens, start, level.window(refeed)), start, known)
    logits, cache, features = level.score(window, start, cache)

    def of_round(x):  # [B, W, ...] -> [B, G + 1, ...]
        return read_at(x, length - 1 - start, rows) if refeed else x[:, :rows]

    logits = _fitted(of_round(logits), sampling.vocab_size)
    adjusted = adjust(logits, tokens, length[:, None] + jnp.arange(rows)[None, :], sampling)
    verdict = verify(_lawful(adjusted) if depth else adjusted, draft, length, sampling, depth)
    appended, ended = _cut(verdict, length, limit, unfinished, sampling.stop_token_ids)
    broken = progress.broken
    if depth == 0:  # a draft's are replaced by lawful ones
        lawful = _lawful_rows(adjusted, verdict, sampling)
        broken |= unfinished & (lawful < appended)
        ended &= ~broken
        appended = jnp.minimum(appended, lawful)
    kept = jnp.arange(rows)[None, :] < appended[:, None]  # what is made of padding is anything (C13), a state is not
    probs, logprobs = progress.probs, progress.logprobs
    if probs is not None and verdict.probs is not None:
        probs = write_at(probs, length - progress.begin, verdict.probs)
    if logprobs is not None:
        logprobs = write_at(logprobs, length, jnp.where(kept, log_probability(logits, verdict.tokens), 0))
    return progress._replace(
        tokens=write_at(tokens, length, jnp.where(kept, verdict.tokens, 0)),
        length=length + appended,
        ended=progress.ended | ended,
        broken=broken,
        cache=cache,
        features=None if progress.features is None else of_round(features),
        scored_from=length - 1,
        below=below,
        counts=count(progress.counts, draft, verdict, appended, unfinished),
        probs=probs,
        logprobs=logprobs,
    )


def _drafted(level, progress, limit, unfinished, sampling, limits, depth, refeed):
    if level.drafter is None:
        return Draft.empty(unfinished.shape[0], sampling.vocab_size), progress.below, progress.cache
    # The token after the draft comes from the verifier, so one less than what is missing is of use.
    useful = jnp.where(unfinished, jnp.clip(limit - progress.length - 1, 0, level.draft_len), 0)
    ask = Ask(
        sequences=Sequences(progress.tokens, progress.length),
        wanted=jnp.minimum(useful, limits[0]),
        limits=limits[1:],
        lent=Lent(progress.cache, progress.features, progress.scored_from),
        draft_len=level.draft_len,
        depth=depth + 1,
        refeed=refeed,
    )
    proposal = level.drafter.propose(progress.below, ask, sampling)
    draft, below, lent = check_proposal(proposal, level.drafter, ask, sampling)
    return draft, below, lent.cache


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


def _cut(verdict: Verdict, length, limit, unfinished, stop_token_ids):
    """Return how many of the verdict's tokens each row keeps, and whether the last kept one is a stop token."""
    g = jnp.arange(verdict.tokens.shape[1])[None, :]
    stops = jnp.any(verdict.tokens[..., None] == stop_token_ids[None, None, :], axis=-1)
    to_stop = jnp.min(jnp.where(stops, g + 1, verdict.tokens.shape[1] + 1), axis=1)
    kept = jnp.minimum(jnp.minimum(verdict.accepted + 1, limit - length), to_stop)
    kept = jnp.where(unfinished, kept, 0)
    return kept, unfinished & (kept == to_stop)
