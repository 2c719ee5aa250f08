"""Rounds that draft little run a narrower window, and caches of their own catch up when they are asked again (laws 3 and 5, C3).

Notation: B batch, D levels that draft.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import CHAINS, GREEDY, MIXED, PROMPTS, B, S, generate, limits_of, near, sampling_of, stack_of, table, toy, with_models
from toys import Toy, level, level_counts, logprob_rows, ragged, rows, run

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.speculation.widths import run_narrowest

slow = pytest.mark.slow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NowAndThen:
    """A `Control` under which each level drafts a number of tokens that depends on the round, its place and the row."""

    most: jax.Array  # int32 [rounds, D, B]

    def init(self, draft_lens, batch):
        return jnp.int32(0)

    def limits(self, state):
        return self.most[state % len(self.most)]

    def guide(self, state, left):
        return None

    def update(self, state, counts):
        return state + 1


def now_and_then(name, least_of=(0, 0, 0, 1, 2, 5)):
    """Return limits by chance, of which many are 0, for whole rounds too: what was appended meanwhile is to be fed later."""
    draws = np.random.default_rng(5)
    most = draws.choice(least_of, size=(40, len(CHAINS[name]), B))
    most[draws.random(40) < 0.4] = 0
    return NowAndThen(jnp.asarray(most, jnp.int32))


def widened(stack, widths):
    """Return the stack with these widths at every level that has a drafter."""
    if stack is None or not hasattr(stack, "widths"):
        return stack
    return dataclasses.replace(stack, drafter=widened(stack.drafter, widths), widths=widths if stack.drafter else ())


def verdicts(state):
    """Return all counts but of what one width cannot tell: every round is asked for a draft there."""
    return [counts._replace(in_vain=0) for counts in level_counts(state)]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("shared", "coupled"),
        pytest.param("shared>own", "coupled", marks=slow),
        pytest.param("own>shared", "rejection", marks=slow),
        pytest.param("own>shared>own", "coupled", marks=pytest.mark.exhaustive),
    ],
)
def test_any_widths_give_what_one_width_gives(name, rule):
    """Law 5: tokens, log-probabilities and counts, with lengths that change from round to round and row to row."""
    stack = stack_of(name, [near(1), near(2), near(3)][: with_models(name) - 1])
    sampling = sampling_of(rule=rule, seed=3, **MIXED)
    given = *ragged(PROMPTS, S, toy.alarm), jnp.asarray(limits_of(), jnp.int32), sampling
    tokens, length, state = run(stack, *given, control=now_and_then(name))
    assert all(counts.drafted.sum() > 0 for counts in level_counts(state)[:-1])
    for widths in ((1,), (1, 2, 4)):
        ours, ours_length, ours_state = run(widened(stack, widths), *given, control=now_and_then(name))
        assert rows(ours, ours_length) == rows(tokens, length)
        assert jax.tree.all(jax.tree.map(np.array_equal, verdicts(ours_state), verdicts(state)))
        assert all(map(np.array_equal, logprob_rows(ours_state), logprob_rows(state)))
    if rule == "coupled":
        assert rows(tokens, length) == generate(stack_of("shared"), limits_of(), sampling)[0]


@pytest.mark.parametrize("name", ["own", pytest.param("shared>own", marks=slow), pytest.param("own>own", marks=slow)])
def test_a_draft_that_was_not_asked_catches_up(name):
    """Laws 3 and 4: identical models accept each other throughout, also after rounds in which nobody fed the cache."""
    stack, sampling = stack_of(name), sampling_of(seed=7, **GREEDY)
    given = *ragged(PROMPTS, S, toy.alarm), jnp.asarray(limits_of(60), jnp.int32), sampling
    _, _, state = run(stack, *given, control=now_and_then(name))
    for counts in level_counts(state)[: with_models(name) - 1]:
        assert counts.drafted.sum() > 0
        assert np.array_equal(counts.accepted, counts.judged)
    # After 20 rounds off: no pass was made for drafts that nobody wanted. A cache of its own takes two, of 16 tokens at most.
    most = jnp.zeros((21, len(CHAINS[name]), B), jnp.int32).at[20].set(1)
    _, _, state = run(stack, *given[:2], jnp.asarray([len(p) + 22 for p in PROMPTS]), sampling, control=NowAndThen(most))
    assert state.counts.rounds.tolist() == [21] * B
    assert state.counts.drafted.tolist() == [1] * B
    assert level_counts(state)[1].passes == (3 if name.startswith("own") else 1)


@dataclasses.dataclass(frozen=True)
class Counting:
    """A `Toy` whose cache counts, beside the tokens, the passes of each width, int32 [65]."""

    toy: Toy

    @property
    def vocab_size(self):
        return self.toy.vocab_size

    def row_multiple(self, params):
        return 1

    def init_cache(self, params, batch, slots):
        return self.toy.init_cache(params, batch, slots), jnp.zeros((65,), jnp.int32)

    def __call__(self, params, tokens, start, cache, *, features=False):
        logits, tokens_cached, _ = self.toy(params, tokens, start, cache[0])
        return logits, (tokens_cached, cache[1].at[tokens.shape[1]].add(1)), None


def test_a_round_runs_the_least_width_that_holds_its_draft():
    stack = dataclasses.replace(level(Counting(toy), table, level(toy, table), 4), widths=(1, 2, 4))
    most = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32)[:, None, None], (5, 1, B))  # with 4 tokens, 5 rows
    tokens, length = ragged([p[:1] for p in PROMPTS], S, toy.alarm)  # nothing to prefill
    _, _, state = run(stack, tokens, length, length + 15, sampling_of(), control=NowAndThen(most))
    passes = {1: 1, 2: 1, 3: 1, 4: 1, 5: 1}
    assert {int(n): int(state.counts.by_rows[n]) for n in np.flatnonzero(state.counts.by_rows)} == passes
    widths = state.cache[1]
    assert {int(n): int(widths[n]) for n in np.flatnonzero(widths)} == {1: 1, 2: 1, 4: 2, 5: 1}


@pytest.mark.parametrize("rows_in_use", [0, 1, 2, 3, 4, 5, 8])
def test_one_width_runs(rows_in_use):
    def told(width, cache):
        return cache + width, jnp.int32(width)

    found = run_narrowest((1, 4, 8), jnp.int32(rows_in_use), told, jnp.int32(0), jnp.int32(-1))
    assert [int(x) for x in found] == [next(width for width in (1, 4, 8) if width >= rows_in_use)] * 2


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"widths are \(1, 4\), but windows are multiples of 2 rows"):
        dataclasses.replace(stack_of("shared"), window_multiple=2, widths=(1, 4))
