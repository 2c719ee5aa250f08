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
from mlspecqd_jax.speculation.buffers import SLACK, filled, padded, read_at, write_at
from mlspecqd_jax.speculation.counts import Counts, count
from mlspecqd_jax.speculation.guide import (
    MODEL,
    Guide,
    another_round_pays,
    chances,
    class_of_lead,
    for_its_drafter,
    modelled,
    surviving,
)
from mlspecqd_jax.speculation.judging import Judged, judge, kept
from mlspecqd_jax.speculation.protocols import (
    PADDING,
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
from mlspecqd_jax.speculation.state import DrafterState, State, counts_of, is_unfinished, rolled_back
from mlspecqd_jax.speculation.widths import run_narrowest

CATCH_UP = 16  # tokens that a cache of its own is fed at once


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
    # Windows narrower than that of a whole draft for which a pass is compiled, ascending: rounds that draft little run these.
    widths: tuple[int, ...] = dataclasses.field(metadata={"static": True}, default=())
    # Whether to read the verifier's cache and to write the drafted positions there, where verification overwrites them.
    share_cache: bool = dataclasses.field(metadata={"static": True}, default=False)

    def __post_init__(self):
        if (self.drafter is None) != (self.draft_len == 0) or self.draft_len < 0:
            raise InputError(
                f"draft_len is {self.draft_len} {'without' if self.drafter is None else 'with'} a drafter; "
                "give both, or neither for plain decoding"
            )
        if any(width % self.window_multiple for width in self.widths):
            raise InputError(f"widths are {self.widths}, but windows are multiples of {self.window_multiple} rows; give multiples")
        for depth, level in enumerate(self.levels):
            if level.window(depth) > SLACK:
                raise InputError(
                    f"draft_len {level.draft_len} needs a window of {level.window(depth)} positions; at most {SLACK} are supported"
                )
        below = level_of(self.drafter)
        if below is not None and below.share_cache and below.model != self.model:
            raise InputError("a drafter can share its verifier's cache only if it is the same model with other weights")

    @property
    def levels(self) -> "tuple[Level, ...]":
        """This level and those below it, outermost first."""
        below = level_of(self.drafter)
        return (self, *(() if below is None else below.levels))

    @property
    def name(self) -> str:
        """What it is called where nothing better is known: the type of its model."""
        return type(self.model).__name__

    @property
    def must_follow(self) -> bool:
        """Whether this level, as a drafter, runs in every round of its verifier, since what drafts for it must."""
        return self.drafter is not None and (self.drafter.must_follow or self.drafter.uses_features)

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

    def all_widths(self, refeed: int = 0) -> tuple[int, ...]:
        """Return the widths of the windows for which a pass is compiled, ascending."""
        whole = self.window(refeed)
        return (*(width for width in self.widths if width < whole), whole)

    def score(self, tokens: jax.Array, start: jax.Array, cache: Any) -> Scored:
        """Run one pass of the model over tokens [B, W] at positions start[r] + 0..W-1, and check what it returns."""
        features = self._lends_features
        return check_scored(self.model(self.params, tokens, start, cache, features=features), self.model, tokens, features)

    def init(self, batch: int, slots: int) -> DrafterState:
        """Return the empty caches of this level and those below (see `Drafter`)."""
        below = None if self.drafter is None else self.drafter.init(batch, slots)
        cache = None if self.share_cache else self.model.init_cache(self.params, batch, slots)
        counts = Counts.zeros(batch, self.draft_len)
        none = jnp.zeros((batch,), jnp.int32)
        return DrafterState(cache, self._no_features(batch, slots), none, none, below, counts)

    def feed(self, state: DrafterState, tokens: jax.Array, start: jax.Array, lent: Lent) -> DrafterState:
        """Feed a piece of the prompts to every cache of this level and those below (see `Drafter`)."""
        if self.share_cache:  # what its verifier was fed is in the cache already
            mine = lent
        else:
            scored = self.score(tokens, start, state.cache)
            mine = Lent(scored.cache, scored.features, start)
            there = jnp.sum(tokens != PADDING, axis=1)
            state = state._replace(cache=scored.cache, fed=jnp.where(there > 0, start + there, state.fed))
        if self.drafter is None:
            return state
        return state._replace(below=self.drafter.feed(state.below, tokens, start, mine))

    def propose(self, state: DrafterState, ask: Ask, sampling: Sampling) -> tuple[Draft, DrafterState, Lent]:
        """Run rounds until every row has wanted[r] tokens or drafted a stop token (see `Drafter`)."""
        tokens, length = ask.sequences
        batch = length.shape[0]
        probs = jnp.zeros((batch, ask.draft_len, sampling.vocab_size)) if sampling.rule == "rejection" else None
        limit = length + ask.wanted
        if not self.share_cache:
            state = self._caught_up(state, ask)
        begun = State(
            tokens=tokens,
            length=length,
            begin=length,
            ended=jnp.zeros((batch,), bool),
            broken=jnp.zeros((batch,), bool),
            cache=ask.lent.cache if self.share_cache else state.cache,
            features=state.features,
            scored_from=state.scored_from,
            fed=ask.fed if self.share_cache else state.fed,
            below=state.below,
            counts=state.counts,
            probs=probs,
            logprobs=None,
            classes=None if ask.guide is None else jnp.zeros((batch, ask.draft_len), jnp.int32),
        )
        refeed = ask.refeed if self.share_cache else ask.depth

        def so_far(progress):  # of what is drafted, as `guide` wants to know it
            drafted = progress.length - progress.begin
            alive = surviving(chances(ask.guide, MODEL, progress.classes), drafted)
            alive = jnp.where(drafted == 0, 1, read_at(alive, jnp.maximum(drafted - 1, 0), 1)[:, 0])
            alive = jnp.where(is_unfinished(progress, limit), alive, 0)
            spent = modelled(ask.guide.times[1:], counts_of(progress)) - modelled(ask.guide.times[1:], counts_of(begun))
            return alive, jnp.max(drafted), spent

        def more(progress):
            first = self.must_follow & (progress.counts.passes == begun.counts.passes)
            wanted = jnp.any(is_unfinished(progress, limit))
            if ask.guide is not None:
                wanted &= another_round_pays(ask.guide, *so_far(progress))
            return first | wanted

        def run(progress):
            guide = None if ask.guide is None or self.drafter is None else for_its_drafter(ask.guide, *so_far(progress))
            return run_round(self, progress, limit, sampling, ask.limits, ask.depth, refeed, guide)

        end = jax.lax.while_loop(more, run, begun)
        tokens = read_at(end.tokens, end.begin, ask.draft_len)
        draft = Draft(tokens, end.probs, end.length - end.begin, end.classes, MODEL)
        state = DrafterState(None if self.share_cache else end.cache, end.features, end.scored_from, end.fed, end.below, end.counts)
        return draft, state, ask.lent._replace(cache=end.cache) if self.share_cache else ask.lent

    def _caught_up(self, state: DrafterState, ask: Ask) -> DrafterState:
        """Feed what was appended above while nothing was asked, but for the last `ask.depth` tokens, which a round feeds itself."""
        tokens, length = ask.sequences
        asked = self.must_follow | jnp.any(ask.wanted > 0)

        def lacks(state):
            return asked & jnp.any(state.fed < length - 1 - ask.depth)

        def feed(state):
            window = padded(read_at(tokens, state.fed, CATCH_UP), state.fed, length - 1)
            cache = self.score(window, state.fed, state.cache).cache
            fed = jnp.minimum(state.fed + CATCH_UP, length - 1)
            rows = jnp.clip(jnp.max(length - 1 - state.fed), 0, CATCH_UP)
            return state._replace(cache=cache, fed=fed, counts=state.counts.passed(rows))

        return jax.lax.while_loop(lacks, feed, state)

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
    level: Level,
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
    unfinished = is_unfinished(progress, limit)
    length = progress.length
    start = jnp.clip(progress.fed, length - 1 - refeed, length - 1)
    sampling = sampling.of_round(length)
    draft, below, cache = _drafted(level, progress, limit, unfinished, sampling, limits, depth, start, refeed, guide)
    tokens = write_at(progress.tokens, length, draft.tokens)
    # A draft's row that is finished here may yet have to catch up; the target's has nothing to be fed.
    known = length + draft.length if depth else jnp.where(unfinished, length + draft.length, start)
    rows = jnp.max(known - start)

    told = {"logprobs": progress.logprobs is not None, "leads": progress.classes is not None}

    def score(width, cache):
        n = min(width, level.draft_len + 1)
        window = padded(read_at(tokens, start, width), start, known)
        logits, cache, features = level.score(window, start, cache)

        def of_round(x):  # [B, W, ...] -> [B, n, ...]
            return read_at(x, length - 1 - start, n) if refeed else x[:, :n]

        judged = judge(of_round(logits), tokens, length, draft, sampling, depth, **told)
        return cache, (judged, None if progress.features is None else filled(of_round(features), level.draft_len + 1))

    nothing = Judged.nothing(draft, **told), progress.features
    cache, (judged, features) = run_narrowest(level.all_widths(refeed), rows, score, cache, nothing)
    verdict = judged.verdict
    appended, ended = kept(judged, length, limit, unfinished, sampling.stop_token_ids)
    broken = progress.broken
    if depth == 0:  # a draft's logits are replaced by lawful ones
        broken |= unfinished & (judged.lawful < appended)
        ended &= ~broken
        appended = jnp.minimum(appended, judged.lawful)
    probs, logprobs, classes = progress.probs, progress.logprobs, progress.classes
    if probs is not None and verdict.probs is not None:
        probs = write_at(probs, length - progress.begin, verdict.probs)
    if logprobs is not None:
        logprobs = write_at(logprobs, length, judged.logprobs)
    if classes is not None:
        classes = write_at(classes, length - progress.begin, class_of_lead(verdict.leads))
    length = length + appended
    return progress._replace(
        tokens=write_at(tokens, progress.length, verdict.tokens),
        length=length,
        ended=progress.ended | ended,
        broken=broken,
        cache=cache,
        features=features,
        scored_from=progress.length - 1,
        fed=length - 1,
        below=rolled_back(below, length - 1),
        counts=count(progress.counts, draft, verdict, appended, unfinished).passed(rows),
        probs=probs,
        logprobs=logprobs,
        classes=classes,
    )


def level_of(drafter: Any) -> Level | None:
    """Return the level that a drafter is, or that drafts in it beside something else, if there is one."""
    return drafter if isinstance(drafter, Level) else getattr(drafter, "level", None)


def _drafted(level, progress, limit, unfinished, sampling, limits, depth, start, refeed, guide):
    if level.drafter is None:
        return Draft.empty(unfinished.shape[0], sampling), progress.below, progress.cache
    # The token after the draft comes from the verifier, so one less than what is missing is of use.
    useful = jnp.where(unfinished, jnp.clip(limit - progress.length - 1, 0, level.draft_len), 0)
    ask = Ask(
        sequences=Sequences(progress.tokens, progress.length),
        wanted=jnp.minimum(useful, limits[0]),
        limits=limits[1:],
        lent=Lent(progress.cache, progress.features, progress.scored_from),
        draft_len=level.draft_len,
        depth=depth + 1,
        fed=start,
        refeed=refeed,
        guide=guide,
    )
    proposal = level.drafter.propose(progress.below, ask, sampling)
    draft, below, lent = check_proposal(proposal, level.drafter, ask, sampling)
    return draft, below, lent.cache
