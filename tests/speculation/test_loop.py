"""Plain decoding on toy models (law 2) against a Python loop: limits, stop tokens, prompts in pieces, and refusals."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from loops import (
    GREEDY,
    MIXED,
    PENALIZED,
    PROMPTS,
    B,
    G,
    S,
    V,
    generate,
    jit_advance,
    jit_init,
    other_table,
    plain,
    prompts_of,
    sampling_of,
    script,
    table,
    toy,
)
from oracles import decode_oracle
from toys import EMPTY, Markov, ToyDrafter, chain, level, logprob_rows, pick_rows, ragged, rows, run

from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.loop import buffer_length, init
from mlspecqd_jax.speculation.settings import Sampling


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize("choice", [GREEDY, MIXED, MIXED | PENALIZED], ids=["greedy", "mixed", "penalized"])
def test_plain_decoding_equals_a_loop(rule, choice):
    """Limits a row, below and beyond what there is room for; no row notices its neighbours."""
    sampling = sampling_of(rule=rule, seed=5, stop_token_ids=[6], **choice)
    limits = [40, 2, 3, 64, 1000, 30]
    out, state = generate(plain, limits, sampling)
    truth, logprobs = decode_oracle(toy, table, PROMPTS, limits, sampling, S)
    assert out == truth
    for ours, theirs in zip(logprob_rows(state), logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    new = [len(row) - len(prompt) for row, prompt in zip(truth, PROMPTS, strict=True)]
    assert new[1:3] == [0, 0]  # nothing to do
    assert state.counts.rounds.tolist() == new
    assert state.counts.passes == max(new)
    assert state.ended.tolist() == [n > 0 and row[-1] == 6 for n, row in zip(new, truth, strict=True)]
    assert toy.alarm not in itertools.chain(*out)


def test_limits_are_clipped_to_what_leaves_room_for_a_window():
    out, state = generate(plain, [10**6] * B, sampling_of())
    assert [len(row) for row in out] == [S - SLACK] * B
    assert not state.ended.any()


def test_stop_tokens_end_a_row_among_new_tokens_only():
    limits = [40] * B
    free, _ = generate(plain, limits, sampling_of(seed=1, temperature=1))
    stop = 2  # within some prompts and the last token of others
    out, state = generate(plain, limits, sampling_of(seed=1, temperature=1, stop_token_ids=[stop]))
    for row, whole, prompt, ended in zip(out, free, PROMPTS, state.ended.tolist(), strict=True):
        assert ended == (stop in whole[len(prompt) :])
        end = whole.index(stop, len(prompt)) + 1 if ended else 40
        assert row == whole[:end]
    assert np.all(np.asarray(state.ended)[[1, 3, 4]])

    # At the limit exactly, the row has ended as well as reached it.
    out, state = generate(plain, [len(row) for row in out], sampling_of(seed=1, temperature=1, stop_token_ids=[stop]))
    assert state.ended.tolist() == [row[-1] == stop and len(row) > len(prompt) for row, prompt in zip(out, PROMPTS, strict=True)]


def test_many_stop_tokens():
    sampling = sampling_of(seed=3, temperature=2, stop_token_ids=[1, 4, 5])
    assert generate(plain, [60] * B, sampling)[0] == decode_oracle(toy, table, PROMPTS, [60] * B, sampling, S)[0]


def alone(stack, sampling, limits, r):
    """Row r as a batch of its own."""
    own = pick_rows(sampling, slice(r, r + 1))
    return generate(stack, limits[r : r + 1], own, PROMPTS[r : r + 1])[0][0]


slow = pytest.mark.slow
drafted = level(toy, table, ToyDrafter(other_table, toy), G)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack", "rule"),
    [
        (plain, "coupled"),
        (drafted, "rejection"),
        pytest.param(plain, "rejection", marks=slow),
        pytest.param(drafted, "coupled", marks=slow),
    ],
    ids=["plain-coupled", "drafted-rejection", "plain-rejection", "drafted-coupled"],
)
def test_a_row_equals_that_row_alone(stack, rule):
    limits = [30, 33, 12, 64, 50, 20]
    for choice in (GREEDY, MIXED):
        sampling = sampling_of(rule=rule, seed=5, stop_token_ids=[6], **choice)
        together, _ = generate(stack, limits, sampling)
        assert [alone(stack, sampling, limits, r) for r in range(B)] == together
    assert sampling.seed.tolist() == [5 + r for r in range(B)]


def test_drafting_from_another_model_changes_nothing_when_coupled_or_greedy():
    limits = [30, 33, 12, 64, 50, 20]
    for choice in (GREEDY, MIXED):
        sampling = sampling_of(seed=5, stop_token_ids=[6], **choice)
        ours, state = generate(drafted, limits, sampling)
        truth, _ = generate(plain, limits, sampling)
        assert ours == truth
        assert 0 < state.counts.accepted.sum() < state.counts.judged.sum()
    greedy = [generate(stack, limits, sampling_of(rule="rejection")) for stack in (drafted, plain)]
    assert greedy[0][0] == greedy[1][0]
    assert greedy[0][1].counts.passes < greedy[1][1].counts.passes


@pytest.mark.parametrize("width", [16, 64, 256])
def test_prompts_are_fed_in_pieces(width):
    size = buffer_length(2 * 256 + 3 + 8)
    assert size == 768
    sampling = sampling_of(1, temperature=1, seed=4)
    rng = np.random.default_rng(width)
    for n in (1, width - 1, width, width + 1, 2 * width + 3):
        prompt = rng.integers(V - 1, size=n).tolist()
        tokens, length = prompts_of([prompt], size)
        state = jit_init(plain, tokens, length, sampling, prefill_width=width)
        assert state.cache[0, : n - 1].tolist() == prompt[:-1]
        assert np.all(state.cache[0, n - 1 :] == EMPTY)
        out = jit_advance(plain, state, jnp.asarray([n + 6]), sampling, 100)
        assert rows(out.tokens, out.length) == decode_oracle(toy, table, [prompt], [n + 6], sampling, size)[0]


def test_prompts_of_all_lengths_share_their_pieces():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(V - 1, size=n).tolist() for n in (1, 15, 16, 17, 35, 63)]
    tokens, length = prompts_of(prompts)
    sampling = sampling_of()
    for width in (16, 32, 64, 256):  # 256 is cut to the buffer's 128
        cache = np.asarray(jit_init(plain, tokens, length, sampling, prefill_width=width).cache)
        assert [row[: len(p) - 1].tolist() for row, p in zip(cache, prompts, strict=True)] == [p[:-1] for p in prompts]


def test_levels_refuse_what_does_not_fit():
    drafter = script(PROMPTS, "wrong")
    for wrong in ((None, 3), (drafter, 0), (None, -1), (drafter, -1)):
        with pytest.raises(ValueError, match="draft_len"):
            Level(toy, table, *wrong)
    with pytest.raises(ValueError, match="window of 65 positions; at most 64"):
        Level(toy, table, drafter, 64)
    with pytest.raises(ValueError, match="window of 80"):
        Level(toy, table, drafter, 60, window_multiple=16 * 5)
    assert [Level(toy, table, drafter, g, multiple).window() for g, multiple in ((63, 1), (1, 2), (2, 2), (15, 16), (16, 16))] == [
        64,
        2,
        4,
        16,
        32,
    ]
    assert Level(toy, table, window_multiple=2).window() == 2


def test_a_buffer_without_room_for_a_window_is_refused():
    tokens, length = prompts_of([[1]], 8)
    with pytest.raises(ValueError, match="tokens has 8 positions, but a window of 16 needs more"):
        init(level(toy, table, window_multiple=16), tokens, length, sampling_of(1))


def test_buffers_leave_room_for_a_window():
    assert [buffer_length(n) for n in (1, 192, 193, 448)] == [256, 256, 512, 512]


@pytest.mark.parametrize("broken", [np.nan, -np.nan, np.inf, -np.inf], ids=["NaN", "-NaN", "inf", "all -inf"])
@pytest.mark.parametrize("draft", ["", pytest.param("own", marks=pytest.mark.slow)], ids=["plain", "drafted"])
def test_a_row_ends_where_the_targets_logits_are_no_numbers(draft, broken):
    """Where it is known: after token 1 then 2. Nothing is appended from there on, whatever is drafted, and other rows go on."""
    model = Markov()
    sound = model.table(3)
    place = (1 + 1) * (model.vocab_size + 1) + 2 + 1
    row = jnp.full((model.vocab_size,), broken)
    table = sound.at[place].set(row if broken == -np.inf else row.at[1:].set(0.0))
    prompts = [[0], [3, 1], [1, 2], [2, 0]]
    tokens, length = ragged(prompts, 256)
    limit = jnp.full((4,), 40)
    ended = []
    for choice in ({}, {"temperature": [0, 0.9, 0.9, 1.2], "top_k": 3}, {"temperature": 0.9, "min_p": 0.01, "rule": "rejection"}):
        sampling = Sampling.create(4, model.vocab_size, seed=5, **choice)
        stack = chain(draft, [table, sound], [3] * bool(draft), model)
        _, end, state = run(stack, tokens, length, limit, sampling)
        found = rows(state.tokens, end)
        for r, row in enumerate(found):
            met = next((i for i in range(len(prompts[r]), len(row) + 1) if row[max(i - 2, 0) : i] == [1, 2]), None)
            assert bool(state.broken[r]) == (met is not None)
            assert len(row) == (40 if met is None else met)
        if choice.get("rule") != "rejection":
            whole = rows(*run(chain("", [sound], [], model), tokens, length, limit, sampling)[:2])
            assert all(mine == theirs[: len(mine)] for mine, theirs in zip(found, whole, strict=True))
        ended += np.asarray(state.broken).tolist()
        assert state.broken[2]
    assert not all(ended)
