"""Tells the host what a stack does while it runs: a scorer and a drafter that log what others do, and a stack of them.

A scorer is all that a level calls, so that nothing else has to know. Callbacks are ordered, and a pass waits for the one before it.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

import mlspecqd_jax as mlsd

DEPTH = "depth"  # the name by which a level's depth travels with its parameters: levels that share a cache must have equal scorers


class Event(NamedTuple):
    """A pass of a level; or, where `start` is -1, what a drafter without passes proposed."""

    depth: int
    start: int  # absolute position of the window's first token
    window: list[int]
    began: float  # seconds
    ended: float


class Log:
    """What the host was told."""

    def __init__(self):
        self.events: list[Event] = []

    def begin(self, depth, start, window):
        self.events.append(Event(int(depth), int(start[0]), np.asarray(window)[0].tolist(), time.perf_counter(), 0.0))
        return window

    def end(self, _):
        self.events[-1] = self.events[-1]._replace(ended=time.perf_counter())

    def proposal(self, depth, tokens, length):
        now = time.perf_counter()
        self.events.append(Event(int(depth), -1, np.asarray(tokens)[0, : int(length[0])].tolist(), now, now))
        return length


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A `Scorer` that logs the passes of another; what it computes is that one's."""

    scorer: mlsd.Scorer
    log: Log

    @property
    def vocab_size(self) -> int:
        return self.scorer.vocab_size

    def row_multiple(self, params) -> int:
        return self.scorer.row_multiple(params)

    def init_cache(self, params, batch, slots):
        return self.scorer.init_cache(params, batch, slots)

    def __call__(self, params, tokens, start, cache, *, features=False):
        like = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)
        tokens = io_callback(self.log.begin, like, params[DEPTH], start, tokens, ordered=True)  # the pass waits for what it returns
        scored = mlsd.Scored(*self.scorer(params, tokens, start, cache, features=features))
        io_callback(self.log.end, None, scored.logits[0, 0, 0], ordered=True)
        return scored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecordedDrafter:
    """A `Drafter` that logs what another one, which is no level, proposes."""

    drafter: mlsd.Drafter
    log: Log = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})

    @property
    def name(self) -> str:
        return self.drafter.name

    @property
    def must_follow(self) -> bool:
        return self.drafter.must_follow

    @property
    def uses_features(self) -> bool:
        return self.drafter.uses_features

    def init(self, batch, slots):
        return self.drafter.init(batch, slots)

    def feed(self, state, tokens, start, lent):
        return self.drafter.feed(state, tokens, start, lent)

    def propose(self, state, ask, sampling):
        draft, *rest = self.drafter.propose(state, ask, sampling)
        like = jax.ShapeDtypeStruct(draft.length.shape, draft.length.dtype)
        length = io_callback(self.log.proposal, like, self.depth, draft.tokens, draft.length, ordered=True)
        return draft._replace(length=length), *rest


def recorded(level: Any, log: Log, depth: int = 0) -> Any:
    """Return a stack that logs the passes of its levels, and what a drafter below them proposes."""
    if level is None:
        return None
    if not isinstance(level, mlsd.Level):
        return RecordedDrafter(level, log, depth)
    scorer, params, drafter = (
        Recorded(level.model, log),
        level.params | {DEPTH: jnp.int32(depth)},
        recorded(level.drafter, log, depth + 1),
    )
    return dataclasses.replace(level, model=scorer, params=params, drafter=drafter)
