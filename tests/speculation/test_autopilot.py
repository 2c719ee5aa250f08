"""The autopilot: its guarantee (C14), texts that do not depend on it (law 5, C12), one program for all plans (law 7).

Notation: B batch, L levels, N new tokens, G tokens of a draft.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import MIXED, PROMPTS, S, V, generate, limits_of, near, plain, sampling_of, shared_toy, table, toy
from hypothesis import given, settings
from hypothesis import strategies as st
from players import Played, play
from toys import level_counts, quick_jit, ragged, rows

from mlspecqd_jax.speculation.autopilot import ALLOWANCE, ALLOWANCE_OF_ALL, ASKING, ASKING_AT_ONCE, LOSS, Autopilot
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.drafters.either import Either
from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup
from mlspecqd_jax.speculation.guide import CLASSES, MODEL, class_of_lead, modelled
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.loop import generate_tokens
from mlspecqd_jax.speculation.state import counts_of

N, G, LETTERS = 96, 16, 11


def times_of(first, slopes):
    """Return times [L, SLACK + 1] of passes, `first` over one row and so much more for each other, in passes of the target."""
    rows = np.arange(SLACK + 1)
    times = np.stack([base * (1 + slope * np.maximum(rows - 1, 0)) * (rows > 0) for base, slope in zip(first, slopes, strict=True)])
    return jnp.asarray(times / times[0, 1], jnp.float32)


def prior_of(chance, weight=0.5):
    """Return a prior [L, 2, CLASSES, 2] by which every token is accepted at this chance."""
    counts = np.broadcast_to(np.array([chance, 1.0]) * weight, (3, 2, CLASSES, 2))
    return jnp.asarray(counts, jnp.float32)


def texts(hits, leads, seed=0):
    """Return texts [R, N], of few letters so that look-up finds much, whose twin is right where hits [R, N, G] say so."""
    rng = np.random.default_rng(seed)
    count = len(hits)
    begin = rng.integers(1, 9, size=count).astype(np.int32)
    text = rng.integers(0, LETTERS, size=(count, 16 + N + G)).astype(np.int32)
    text[:, 60:80] = text[:, 20:40]  # what look-up is right about
    place = begin[:, None, None] + np.arange(N)[None, :, None] + np.arange(G)[None, None, :]
    own = text[np.arange(count)[:, None, None], place]
    wrong = (own + 1 + rng.integers(0, LETTERS - 1, size=own.shape)) % LETTERS
    small = np.where(rng.random(text.shape) < 0.7, text, (text + 1) % LETTERS).astype(np.int32)
    lead = np.broadcast_to(np.asarray(leads, np.float32), own.shape)
    return Played(text, begin, np.where(hits, own, wrong).astype(np.int32), lead, small, np.ones(text.shape, np.float32))


def shapes(kind, count=1):
    """Return hits [R, N, G] of a kind, and leads that do not tell of them."""
    place = np.arange(N)[:, None] + np.arange(G)[None, :]
    hits = {
        "never": np.zeros((N, G), bool),
        "always": np.ones((N, G), bool),
        "stretches": place // 16 % 2 == 0,
        "good, then never": place < 48,
        "all but the first": np.broadcast_to(np.arange(G)[None, :] > 0, (N, G)),
    }[kind]
    return np.broadcast_to(hits, (count, N, G)), 8.0 if kind == "all but the first" else 1.0


def assert_account_holds(state, times):
    """The time of all passes, by the table, is within what was promised, whatever was accepted."""
    asking = float(state.control.asking)
    time = float(modelled(times, counts_of(state))) + asking * int(state.counts.in_vain)
    new = int(jnp.max(state.length - state.begin))
    allowance = ALLOWANCE_OF_ALL * N if len(state.length) > 1 else min(ALLOWANCE, ALLOWANCE_OF_ALL * N)
    assert time <= LOSS * new + allowance + (ASKING * time + ASKING_AT_ONCE) * (asking > 0) + 1e-3
    np.testing.assert_allclose(state.plan.time, time, rtol=1e-4)
    return time


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["never", "always", "stretches", "good, then never", "all but the first"]),
    twin=st.floats(0.02, 1.5),
    small=st.floats(0.005, 1.0),
    slopes=st.tuples(st.floats(0, 0.3), st.floats(0, 0.5), st.floats(0, 0.5)),
    chance=st.floats(0.02, 0.98),
    weight=st.sampled_from([0.01, 0.5, 20.0]),
    rate=st.floats(0.5, 4),
    asking=st.sampled_from([0.0, 0.01, 0.2]),
)
def test_the_loss_is_bounded_whatever_is_accepted(kind, twin, small, slopes, chance, weight, rate, asking):
    """C14, as an inequality on the clock of the table: also where priors lie, and drafts are right until they are trusted."""
    times = times_of((1, twin, small), slopes)
    control = Autopilot.create(times, prior_of(chance, weight), 2, rate=rate, asking=asking)
    assert_account_holds(play(texts(*shapes(kind)), LETTERS, control), times)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(kind=st.sampled_from(["never", "always", "stretches"]), twin=st.floats(0.05, 1.0), chance=st.floats(0.05, 0.95))
def test_the_loss_is_bounded_in_a_batch(kind, twin, chance):
    """C14."""
    times = times_of((1, twin, 0.05), (0.05, 0.05, 0.05))
    control = Autopilot.create(times, prior_of(chance), 2, rate=1.5)
    assert_account_holds(play(texts(*shapes(kind, 4)), LETTERS, control), times)


def test_without_the_account_the_loss_is_not_bounded(monkeypatch):
    """The same, and how far a control that trusts its prior is from passing it."""
    monkeypatch.setattr(Autopilot, "_balance", lambda self, state, left: jnp.float32(1e6))
    times, played = times_of((1, 0.9, 0.5), (0.05, 0.05, 0.05)), texts(*shapes("never"))
    traced_anew = quick_jit(lambda *given: generate_tokens(*given[:5], control=given[5], prefill_width=64))
    monkeypatch.setattr(
        "players._run",
        lambda stack, tokens, length, limit, control: traced_anew(
            stack, tokens, length, limit, sampling_of_letters(len(length)), control
        ),
    )
    state = play(played, LETTERS, Autopilot.create(times, prior_of(0.98, 20.0), 2, rate=1.0))
    with pytest.raises(AssertionError):
        assert_account_holds(state, times)


def test_what_pays_is_drafted_and_what_does_not_is_not():
    """A draft that is always right is drafted to its full length; one that never is, hardly, and no more in the end."""
    times = times_of((1, 0.3, 0.05), (0.02, 0.02, 0.02))
    control = Autopilot.create(times, prior_of(0.7), 2, rate=1.5)
    always = play(texts(*shapes("always")), LETTERS, control)
    assert assert_account_holds(always, times) < N / 2.4
    never = play(texts(*shapes("never")), LETTERS, control)
    assert assert_account_holds(never, times) < 1.03 * N
    judged = [int(state.counts.by_class[MODEL, ..., 1].sum()) for state in (always, never)]
    assert judged[0] > 50
    assert judged[1] < 25


def test_asking_in_vain_takes_little():
    """Where asking is dear it ends, but for a round now and then, until something is gained; where it is cheap it goes on."""
    times = times_of((1, 2.0, 2.0), (0.3, 0.3, 0.3))
    asked = {}
    for asking in (0.0, 0.2):
        control = Autopilot.create(times, prior_of(0.02, 20.0), 2, asking=asking)
        state = play(texts(*shapes("never")), LETTERS, control)
        assert_account_holds(state, times)
        asked[asking] = int(state.counts.in_vain)
    assert asked[0.0] > 0.8 * N
    assert 1 <= asked[0.2] <= (ASKING_AT_ONCE + ASKING * 1.1 * N) / 0.2


@pytest.mark.parametrize("kind", ["never", "stretches"])
def test_what_is_learnt_does_not_depend_on_how_rounds_are_cut(kind):
    """C12: under the rejection rule a seed means the same whatever the clock made of the calls."""
    control = Autopilot.create(times_of((1, 0.5, 0.5), (0.05, 0.05, 0.05)), prior_of(0.4), 2, asking=0.05)
    played = texts(*shapes(kind))
    found = [play(played, LETTERS, control, rounds) for rounds in (1000, 1, 7)]
    assert 5 < int(found[0].counts.in_vain) < N / 2
    for other in found[1:]:
        same = jax.tree.map(
            np.array_equal, (found[0].counts, found[0].plan._replace(least=0)), (other.counts, other.plan._replace(least=0))
        )
        assert jax.tree.all(same)


@pytest.mark.parametrize("limit", [0, 3])
def test_a_draft_that_is_off_is_never_asked_for(limit):
    """Nor does a round know of it: all of them go by before the control is asked again."""
    control = Autopilot.create(times_of((1, 0.1, 0.1), (0, 0, 0)), prior_of(0.9), 2).capped(jnp.full((1,), limit))
    state = play(texts(*shapes("always")), LETTERS, control)
    assert (int(state.counts.drafted[0]) > 0) == (limit > 0)
    if limit == 0:
        assert int(state.counts.in_vain) == 0
        assert state.counts.by_rows[1] == N == state.plan.time


def stack_of_toys(*seeds):
    """Return the target over look-up or its twin, over look-up or a small draft, with a cache of its own: toys that often agree."""
    near_by = [near(seed) for seed in seeds]
    small = Level(shared_toy, (near_by[1], jnp.int32(0)))
    twin = Level(shared_toy, (near_by[0], jnp.int32(1)), Either(small), 3, widths=(1,), share_cache=True)
    return Level(shared_toy, (table, jnp.int32(0)), Either(twin), 6, widths=(1, 2))


def some_control(seed):
    rng = np.random.default_rng(seed)
    times = times_of((1, rng.uniform(0.05, 1), rng.uniform(0.01, 0.5)), rng.uniform(0, 0.2, 3))
    prior = jnp.asarray(np.stack([rng.random((3, 2, CLASSES)), np.ones((3, 2, CLASSES))], axis=-1), jnp.float32)
    return Autopilot.create(times, prior * jnp.float32(rng.choice([0.01, 1, 100])), 2, rate=rng.uniform(0.3, 4))


guided = quick_jit(
    lambda stack, tokens, length, limit, sampling, control: generate_tokens(stack, tokens, length, limit, sampling, control=control)
)


def test_texts_do_not_depend_on_what_is_learnt():
    """Law 5 and C12, greedy and coupled, with tables by chance: every source is used, and nobody reads what nobody wrote."""
    given = *ragged(PROMPTS, S, toy.alarm), jnp.asarray(limits_of(), jnp.int32)
    sources = np.zeros(2)
    for seed, choice in ((0, {}), (1, MIXED), (2, MIXED), (3, MIXED)):
        sampling = sampling_of(seed=7, **choice)
        tokens, length, state = guided(stack_of_toys(1, 2), *given, sampling, some_control(seed))
        assert rows(tokens, length) == generate(plain, limits_of(), sampling)[0]
        sources += np.asarray(state.counts.by_class[..., 1].sum((1, 2)))
        for counts in level_counts(state)[:2]:
            assert np.array_equal(counts.by_class[..., 0].sum((0, 2)), counts.accepted.sum(1))
            assert np.array_equal(counts.by_class[..., 1].sum((0, 2)), counts.judged.sum(1))
    assert np.all(sources > 20)


def test_another_plan_is_no_other_program():
    """Law 7."""
    traces = []

    @jax.jit
    def run(stack, tokens, length, limit, sampling, control):
        traces.append(0)
        return generate_tokens(stack, tokens, length, limit, sampling, control=control)

    given = *ragged(PROMPTS, S, toy.alarm), jnp.asarray(limits_of(2), jnp.int32), sampling_of(seed=1)
    shape = [run.eval_shape(stack_of_toys(1, 2), *given, some_control(seed)) for seed in (0, 5)]
    assert len(traces) == 1
    assert shape[0] == shape[1]


def test_classes():
    leads = jnp.asarray([0, 0.1, 0.2, 0.3, 0.7, 1.5, 3, 7, 9, jnp.inf, jnp.nan], jnp.float32)
    assert class_of_lead(leads).tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 0]
    assert class_of_lead(leads).max() == CLASSES - 1


def test_look_up_alone_is_guided_too():
    """C14, for a stack whose only drafter is look-up."""
    stack = Level(toy, table, PromptLookup(), 6)
    times = times_of((1,), (0.1,))
    control = Autopilot.create(times, prior_of(0.5)[:1], 1, rate=1.5)
    given = *ragged(PROMPTS[:1], S, toy.alarm), jnp.asarray(limits_of(60)[:1], jnp.int32)
    tokens, length, state = guided(stack, *given, sampling_of(1), control)
    assert rows(tokens, length) == generate(plain, limits_of(60)[:1], sampling_of(1), PROMPTS[:1])[0]
    assert float(state.plan.time) <= LOSS * int(length[0] - state.begin[0]) + ALLOWANCE


def sampling_of_letters(batch):
    return dataclasses.replace(sampling_of(batch), vocab_size=LETTERS, logit_bias=None, logprobs=False)


assert V < LETTERS
