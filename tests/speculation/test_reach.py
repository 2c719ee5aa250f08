"""C15: how far back windows go in any stack, which a cache that does not hold all positions must keep."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from chains import CHAINS, MIXED, PROMPTS, S, limits_of, near, sampling_of, stack_of, table, toy, with_models
from refusals import refused
from test_widths import now_and_then
from toys import Toy, level, ragged, run

from mlspecqd_jax.speculation.drafters.either import Either
from mlspecqd_jax.speculation.level import Level, reach
from mlspecqd_jax.speculation.protocols import PADDING


@dataclasses.dataclass(frozen=True)
class Reaching:
    """A scorer whose cache knows, beside its own, how far it was fed, and how much of that a later window lay behind, int32 [B].

    It also knows where the last window of the outermost level began, and no later one may begin before.
    """

    scorer: Any
    reach: int | None = None
    outermost: bool = False

    @property
    def of_a_draft(self):
        return dataclasses.replace(self, outermost=False)

    @property
    def vocab_size(self):
        return self.scorer.vocab_size

    def row_multiple(self, params):
        return 1

    def init_cache(self, params, batch, slots):
        none = jnp.zeros((batch,), jnp.int32)
        return self.scorer.init_cache(params, batch, slots), none, none, none

    def __call__(self, params, tokens, start, cache, *, features=False):
        own, end, furthest, settled = cache
        used = jnp.sum(tokens != PADDING, axis=1)
        back = jnp.where(start < settled, TOO_FAR, end - start)
        furthest = jnp.where(used > 0, jnp.maximum(furthest, back), furthest)
        settled = jnp.where(self.outermost & (used > 0), start, settled)
        logits, own, _ = self.scorer(params, tokens, start, own)
        return logits, (own, jnp.where(used > 0, jnp.maximum(end, start + used), end), furthest, settled), None


def watched(stack, outermost=True):
    """The same stack with scorers that watch their caches."""
    drafter = stack.drafter
    if isinstance(drafter, Either):
        drafter = dataclasses.replace(drafter, level=watched(drafter.level, False))
    elif isinstance(drafter, Level):
        drafter = watched(drafter, False)
    return dataclasses.replace(stack, model=Reaching(stack.model, outermost=outermost), drafter=drafter)


def furthest(state):
    """Of every cache of a stack, the outermost's first."""
    own = [] if getattr(state, "cache", None) is None else [int(np.max(state.cache[2]))]
    return own + (furthest(state.below) if hasattr(state, "below") else [])


TOO_FAR = 1000
MARKS = {"shared>ngram": []}
NAMES = [pytest.param(name, marks=MARKS.get(name, pytest.mark.exhaustive)) for name in CHAINS]


@pytest.mark.parametrize("name", NAMES)
def test_no_window_goes_back_further(name):
    """Rows of different lengths, drafts that are accepted now and then, lengths that change, rows that end before others."""
    stack = watched(stack_of(name, [near(1), near(2), near(3)][: with_models(name) - 1]))
    given = *ragged(PROMPTS, S, toy.alarm), jnp.asarray(limits_of(), jnp.int32), sampling_of(stop_token_ids=[5], **MIXED)
    found = []
    for control in (None,) if name == "shared>ngram" else (None, now_and_then(name)):
        _, _, state = run(stack, *given, control=control)
        found.append(max(furthest(state)))
    assert max(found) <= reach(stack.draft_lens, len(stack.levels))
    if name == "shared>ngram":  # a twin that is done with a row before others feeds its last token too
        assert max(found) == reach(stack.draft_lens, len(stack.levels))


def test_what_keeps_too_little_is_refused():
    """Before anything is traced, and never by a level that drafts for another."""
    assert reach((4,), 2) == 5
    for kept in (5, 6, None):
        twin = level(Reaching(Toy(), kept), table)
        level(Reaching(Toy(), kept), table, dataclasses.replace(twin, share_cache=True), 4)
    twin = level(Reaching(Toy(), 4), table)
    with refused("keeps 4 positions that may be fed again, but these draft lengths ask for 5", "reaching(5)"):
        level(Reaching(Toy(), 4), table, dataclasses.replace(twin, share_cache=True), 4)
