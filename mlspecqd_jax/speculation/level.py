"""The recursion: levels, each a model and what drafts for it.

What a level puts out is an exact sample of its own model whatever drafts below it (`round`), so a level can itself draft for the
level above: `Level.propose` runs rounds until the draft is full (ML-SpecQD, arXiv 2503.13565, for any depth), or until more of it
would not pay. Plain decoding is the level without a drafter: its draft is empty and its window is the pending token.

Notation: B batch, S buffer length, W window, G draft_len, V vocabulary. `length` is the only position state: the token at
length - 1 is *pending* (chosen, not yet fed to the model); caches are indexed by absolute position and whatever lies beyond the
length is neither read nor trimmed. Rows that are finished go around with the others and change nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.speculation.buffers import SLACK, padded, read_at
from mlspecqd_jax.speculation.counts import Counts
from mlspecqd_jax.speculation.guide import (
    MODEL,
    affordable,
    another_round_pays,
    chances,
    for_its_drafter,
    modelled,
    surviving,
)
from mlspecqd_jax.speculation.protocols import (
    PADDING,
    Ask,
    Draft,
    Drafter,
    Lent,
    Scored,
    Scorer,
    check_scored,
    experts_read,
)
from mlspecqd_jax.speculation.round import run_round
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.state import DrafterState, State, counts_of, is_unfinished

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
            kept, asked = getattr(level.model, "reach", None), reach(self.draft_lens, len(self.levels))
            if kept is not None and kept < asked:
                raise InputError(
                    f"the cache of {level.name} keeps {kept} positions that may be fed again, but these draft lengths ask for "
                    f"{asked}; build the stack with mlsd.stack, or give its model as Network.reaching({asked}) returns it"
                )
        below = level_of(self.drafter)
        if below is not None and below.share_cache and _as_draft(below.model) != _as_draft(self.model):
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
        return self.share_cache and self.lends_features

    @property
    def draft_lens(self) -> tuple[int, ...]:
        """The draft_len of every drafter, outermost first."""
        return tuple(level.draft_len for level in self.levels if level.drafter is not None)

    @property
    def lends_features(self) -> bool:
        """Whether its drafter uses the features of its passes."""
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
        features = self.lends_features
        return check_scored(self.model(self.params, tokens, start, cache, features=features), self.model, tokens, features)

    def init(self, batch: int, slots: int) -> DrafterState:
        """Return the empty caches of this level and those below (see `Drafter`)."""
        below = None if self.drafter is None else self.drafter.init(batch, slots)
        cache = None if self.share_cache else self.model.init_cache(self.params, batch, slots)
        tells = jax.eval_shape(lambda: experts_read(self.model, self.model.init_cache(self.params, batch, slots))) is not None
        counts = Counts.zeros(batch, self.draft_len, tells)
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
        if ask.guide is not None:
            ask = self._afforded(state, ask, ask.guide)
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

    def debt(self, state: DrafterState, ask: Ask) -> jax.Array:
        """Return the time, of a guided ask, that catching up takes before anything is drafted, f32 []."""
        if self.share_cache:
            return jnp.float32(0)
        times = ask.guide.times[1]
        lacks = jnp.max(ask.sequences.length - 1 - state.fed)
        pieces = (jnp.maximum(lacks - ask.depth, 0) + CATCH_UP - 1) // CATCH_UP
        return pieces.astype(jnp.float32) * times[CATCH_UP] + times[1 + jnp.clip(lacks, 0, ask.depth)] - times[1]

    def _afforded(self, state, ask, guide):
        """Take the debt from the room; want nothing where that leaves none."""
        guide = guide._replace(room=guide.room - self.debt(state, ask))
        can = affordable(guide, jnp.int32(0), jnp.float32(0))
        return ask._replace(guide=guide, wanted=jnp.where(can, ask.wanted, 0))

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
            before, after = (experts_read(self.model, each) for each in (state.cache, cache))
            return state._replace(cache=cache, fed=fed, counts=state.counts.passed(rows, before, after))

        return jax.lax.while_loop(lacks, feed, state)

    def _no_features(self, batch: int, slots: int) -> jax.Array | None:
        """Return the features of a round before there was one: zeros [B, draft_len + 1, F], or None where nobody uses them."""
        if not self.lends_features:
            return None

        def one_pass():
            rows = jnp.zeros((batch, self.draft_len + 1), jnp.int32)
            cache = self.model.init_cache(self.params, batch, slots)
            return self.score(rows, rows[:, 0], cache).features

        found = jax.eval_shape(one_pass)
        return jnp.zeros(found.shape, found.dtype)


def _as_draft(model: Scorer) -> Scorer:
    return getattr(model, "of_a_draft", model)


def reach(draft_lens: Sequence[int], levels: int) -> int:
    """Return how many positions at the end of what a cache was fed may be fed again, at most, in any stack of these (C15).

    What is drafted in a round lies no further behind the target's pending token than its draft is long, whatever drafts below, and
    no later window starts before that token, but for one token that each level above another may make it feed again.
    """
    return max(draft_lens, default=0) + levels - 1


def level_of(drafter: Any) -> Level | None:
    """Return the level that a drafter is, or that drafts in it beside something else, if there is one."""
    return drafter if isinstance(drafter, Level) else getattr(drafter, "level", None)
