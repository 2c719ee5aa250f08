"""The loop on toy models (law 2, C8): plain decoding against a Python loop, drafts of every quality against plain decoding."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    EMPTY,
    Markov,
    Script,
    Toy,
    ToyDrafter,
    chain,
    count_sequences,
    decode_oracle,
    filtered_oracle,
    g_test,
    level,
    logprob_rows,
    pick_rows,
    quick_jit,
    ragged,
    rows,
    run,
    softmax,
)

from mlspecqd_jax.speculation.level import SLACK, Level
from mlspecqd_jax.speculation.loop import advance, buffer_length, finished, generate_tokens, init, step
from mlspecqd_jax.speculation.settings import Sampling

V, G, S = 8, 4, 128
PROMPTS = [[3], [1, 2], [0, 0, 5], [6, 5, 4, 3, 2], [2] * 9, [1, 3, 5] * 6]
B = len(PROMPTS)

toy = Toy(V)
table, other_table = toy.table(0), toy.table(1)
jit_init = quick_jit(init, static_argnames="prefill_width")
jit_step = quick_jit(step)
jit_advance = quick_jit(advance)

GREEDY = {}
MIXED = {
    "temperature": [0, 0.7, 1, 1.5, 0, 1],
    "top_k": [0, 0, 3, 0, 2, 0],
    "top_p": [1, 1, 1, 0.8, 1, 0.9],
    "min_p": [0, 0.1, 0, 0, 0, 0],
}
PENALIZED = {"presence_penalty": 0.5, "frequency_penalty": [0, 0.3, 0, 0.2, 0, 0.1], "repetition_penalty": [1, 1.2, 1, 1, 0.9, 1]}


def sampling_of(batch=B, **arguments):
    return Sampling.create(batch, V, logprobs=True, **arguments)


def prompts_of(prompts=PROMPTS, size=S):
    """Lay prompts out with alarms beyond them: whoever looks there is heard."""
    return ragged(prompts, size, filler=toy.alarm)


def generate(stack, limits, sampling, prompts=PROMPTS):
    tokens, length, state = run(stack, *prompts_of(prompts), jnp.asarray(limits, jnp.int32), sampling)
    return rows(tokens, length), state


plain = level(toy, table)


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


def script(truth, kind, draft_length=G):
    """Draft what plain decoding gives (perfect), never that (wrong), or anything (random)."""
    perfect = np.asarray(prompts_of(truth)[0])
    tokens = {
        "perfect": perfect,
        "wrong": (perfect + 1) % V,
        "random": np.random.default_rng(0).integers(V, size=perfect.shape),
        "mostly": np.where(np.random.default_rng(1).random(perfect.shape) < 0.7, perfect, (perfect + 1) % V),
    }[kind]
    return Script(jnp.asarray(tokens, jnp.int32), jnp.broadcast_to(jnp.asarray(draft_length, jnp.int32), (len(truth),)), V)


def replayed_counts(truth, begin, limit, drafts, draft_length):
    """The counts of one row by C10, from what plain decoding gives and what was drafted."""
    rounds = drafted = 0
    accepted, judged = np.zeros(G, int), np.zeros(G, int)
    at = begin
    while at < len(truth):
        proposed = max(min(G, draft_length, min(limit, S - SLACK) - at - 1), 0)
        match = 0
        while match < proposed and at + match < len(truth) and drafts[at + match] == truth[at + match]:
            match += 1
        appended = min(match + 1, len(truth) - at)
        kept = proposed if appended == match + 1 else appended  # fewer where a stop token cuts the draft
        rounds, drafted = rounds + 1, drafted + kept
        accepted[: min(match, kept)] += 1
        judged[: min(match + 1, kept)] += 1
        at += appended
    return rounds, drafted, accepted.tolist(), judged.tolist()


@pytest.mark.parametrize("stops", [[], [6, 2]], ids=["no stop", "stops"])
@pytest.mark.parametrize("kind", ["perfect", "wrong", "random", "mostly"])
def test_drafts_of_any_quality_change_nothing_but_the_counts(kind, stops):
    """Limits at every offset within a block; drafts of every length; penalties that see the drafted tokens."""
    sampling = sampling_of(seed=2, stop_token_ids=stops, **MIXED, **PENALIZED)
    for offset, lengths in ((0, [4, 4, 4, 4, 4, 4]), (3, [0, 1, 2, 3, 4, 4])):
        limits = [len(prompt) + 20 + offset + r for r, prompt in enumerate(PROMPTS)]
        truth, plain_state = generate(plain, limits, sampling)
        drafter = script(truth, kind, lengths)
        ours, state = generate(level(toy, table, drafter, G), limits, sampling)
        assert ours == truth
        assert logprob_rows(state) == logprob_rows(plain_state)
        assert np.array_equal(state.ended, plain_state.ended)
        counts = state.counts
        drafts = np.asarray(drafter.tokens)
        for r, prompt in enumerate(PROMPTS):
            replayed = replayed_counts(truth[r], len(prompt), limits[r], drafts[r], lengths[r])
            assert (
                int(counts.rounds[r]),
                int(counts.drafted[r]),
                counts.accepted[r].tolist(),
                counts.judged[r].tolist(),
            ) == replayed
        assert counts.passes == counts.rounds.max()
        assert state.below.tolist() == [counts.passes] * B  # the drafter's own state goes around too
        if kind == "wrong":
            assert not counts.accepted.any()
        if kind == "perfect" and not stops:
            new = [len(row) - len(prompt) for row, prompt in zip(truth, PROMPTS, strict=True)]
            assert counts.rounds.tolist() == [-(-n // (g + 1)) for n, g in zip(new, lengths, strict=True)]
            assert counts.accepted.sum(axis=1).tolist() == [
                n - rounds for n, rounds in zip(new, counts.rounds.tolist(), strict=True)
            ]


@pytest.mark.parametrize(("draft_len", "multiple"), [(63, 1), (3, 16)], ids=["window of 64", "padded window"])
def test_wide_windows_fit_at_the_end_of_the_buffer(draft_len, multiple):
    sampling = sampling_of(seed=2, temperature=1)
    truth, _ = generate(plain, [S] * B, sampling)
    stack = level(toy, table, script(truth, "perfect", draft_len), draft_len, multiple)
    ours, state = generate(stack, [S] * B, sampling)
    assert ours == truth
    assert state.counts.rounds[0] == -(-(S - SLACK - 1) // (draft_len + 1))


def test_a_draft_beyond_the_limit_is_cut_there():
    """Whatever a drafter takes the limit for."""
    sampling = sampling_of(seed=2, temperature=1)
    limits = [20, 21, 22, 23, 24, 25]
    truth, _ = generate(plain, [40] * B, sampling)
    drafter = dataclasses.replace(script(truth, "perfect"), heeds_limit=False)
    ours, _ = generate(level(toy, table, drafter, G), limits, sampling)
    assert ours == [row[:limit] for row, limit in zip(truth, limits, strict=True)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_step_advance_and_generate_tokens_are_one():
    sampling = sampling_of(seed=2, temperature=1, stop_token_ids=[6])
    limits = jnp.asarray([25, 30, 12, 50, 50, 20], jnp.int32)
    stack = level(toy, table, script(generate(plain, limits, sampling)[0], "mostly"), G)
    tokens, length, whole = run(stack, *prompts_of(), limits, sampling)
    assert same((tokens, length), (whole.tokens, whole.length))

    begun = jit_init(stack, *prompts_of(), sampling)
    by_hand, steps = begun, 0
    while not finished(by_hand, limits).all():
        by_hand, steps = jit_step(stack, by_hand, limits, sampling), steps + 1
    assert same(by_hand, whole)
    assert steps == whole.counts.passes

    in_pieces = begun
    for rounds in [2, 0, 1, 3, 100]:
        before = in_pieces
        in_pieces = jit_advance(stack, in_pieces, limits, sampling, rounds)
        assert in_pieces.counts.passes - before.counts.passes == min(rounds, steps - before.counts.passes)
    assert same(in_pieces, whole)
    assert same(jit_advance(stack, begun, limits, sampling, 2**31 - 1), whole)

    # A round more changes nothing but the number of passes.
    more = jit_step(stack, whole, limits, sampling)
    assert rows(more.tokens, more.length) == rows(whole.tokens, whole.length)
    assert logprob_rows(more) == logprob_rows(whole)
    assert same(more.counts._replace(passes=0), whole.counts._replace(passes=0))


def test_resuming_with_a_higher_limit_and_with_other_sampling():
    sampling = sampling_of(seed=2, temperature=[0, 1, 1, 2, 0.5, 1], **PENALIZED)
    first, then = (jnp.full((B,), n, jnp.int32) for n in (22, 41))
    truth, _ = generate(plain, then, sampling)
    stack = level(toy, table, script(truth, "mostly"), G)
    begun = jit_init(stack, *prompts_of(), sampling)
    half = jit_advance(stack, begun, first, sampling, 100)
    assert half.length.tolist() == [22] * B
    resumed = jit_advance(stack, half, then, sampling, 100)
    assert rows(resumed.tokens, resumed.length) == truth

    warm = sampling_of(seed=9, temperature=1.5, top_k=5)
    resumed = jit_advance(stack, half, then, warm, 100)
    halves = rows(half.tokens, half.length)
    assert rows(resumed.tokens, resumed.length) == decode_oracle(toy, table, halves, [41] * B, warm, S)[0]


def test_an_ended_row_stays_ended():
    sampling = sampling_of(seed=2, temperature=1, stop_token_ids=[6, 1])
    truth, _ = generate(plain, [50] * B, sampling)
    stack = level(toy, table, script(truth, "mostly"), G)
    limits = jnp.full((B,), 50, jnp.int32)
    state = jit_advance(stack, jit_init(stack, *prompts_of(), sampling), limits, sampling, 100)
    assert state.ended.any()
    more = jit_advance(stack, state, limits + 10, sampling, 100)
    for r in np.flatnonzero(state.ended):
        assert rows(more.tokens, more.length)[r] == truth[r]


def test_reading_an_unwritten_entry_is_heard():
    """The toy does what the other tests rely on: a forgotten prompt shows."""
    sampling = sampling_of()
    limits = jnp.full((B,), 30, jnp.int32)
    stack = level(toy, table, script(PROMPTS, "wrong"), G)
    begun = jit_init(stack, *prompts_of(), sampling)
    forgotten = begun._replace(cache=jnp.full_like(begun.cache, EMPTY))
    out = jit_advance(stack, forgotten, limits, sampling, 100)
    assert all(
        toy.alarm in row[len(prompt) :]
        for row, prompt in zip(rows(out.tokens, out.length), PROMPTS, strict=True)
        if len(prompt) > 1
    )
    stale = begun._replace(cache=jnp.where(jnp.arange(S) == 0, begun.cache + 1, begun.cache))
    out, good = (jit_advance(stack, state, limits, sampling, 100) for state in (stale, begun))
    changed = [a != b for a, b in zip(rows(out.tokens, out.length), rows(good.tokens, good.length), strict=True)]
    assert changed == [len(prompt) > 1 for prompt in PROMPTS]  # a row of one token writes its entry in the first round


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


def joint_case(batch, seed=0):
    """A model of three tokens in context two, four new tokens: (stacks by name, run arguments, exact joint distribution)."""
    small = Toy(4, order=2)
    target, draft = small.table(10, scale=1.0), small.table(11, scale=1.0)
    prompt = [1, 0]
    probs = {(): 1.0}
    for _ in range(4):
        longer = {}
        for so_far, p in probs.items():
            given = softmax(filtered_oracle(small.truth(target, prompt + list(so_far)), 0.8)[0])
            longer |= {(*so_far, x): p * given[x] for x in range(4)}
        probs = longer
    expected = np.array([probs[key] for key in itertools.product(range(4), repeat=4)])
    stacks = {"plain": level(small, target), "drafted": level(small, target, ToyDrafter(draft, small), 2)}
    tokens = jnp.broadcast_to(ragged([prompt], SLACK + 8)[0], (batch, SLACK + 8))
    sampling = Sampling.create(batch, 4, temperature=0.8, rule="rejection", seed=seed)
    return stacks, (tokens, jnp.full((batch,), 2, jnp.int32), jnp.full((batch,), 6, jnp.int32), sampling), expected


def joint_counts(stack, arguments):
    compiled = quick_jit(generate_tokens) if len(arguments[1]) < 10**5 else jax.jit(generate_tokens)
    tokens, length, state = compiled(stack, *arguments)
    assert np.all(length == 6)
    return count_sequences(np.asarray(tokens)[:, 2:6], 4), state


def check_joint(batch, seed):
    stacks, arguments, expected = joint_case(batch, seed)
    counts, state = joint_counts(stacks["drafted"], arguments)
    assert g_test(counts, expected) > 1e-3
    off = expected**1.05
    assert g_test(counts, off / off.sum()) < 1e-3  # the test sees a little more certainty
    judged = state.counts.judged.sum(axis=0)
    assert np.all(judged > 0.05 * batch)
    assert np.all(0.1 * judged < state.counts.accepted.sum(axis=0))
    assert np.all(state.counts.accepted.sum(axis=0) < 0.95 * judged)
    return counts


@pytest.mark.slow
def test_rejection_keeps_the_joint_distribution_of_plain_decoding():
    check_joint(30_000, seed=0)


@pytest.mark.exhaustive
def test_rejection_keeps_the_joint_distribution_at_length():
    for seed in (10**6, 2 * 10**6):
        check_joint(300_000, seed)


@pytest.mark.slow
def test_plain_decoding_has_the_joint_distribution():
    stacks, arguments, expected = joint_case(300_000)
    assert g_test(joint_counts(stacks["plain"], arguments)[0], expected) > 1e-3


requests = st.tuples(
    st.lists(st.lists(st.integers(0, V - 2), min_size=1, max_size=20), min_size=B, max_size=B),
    st.lists(st.integers(0, 70), min_size=B, max_size=B),
    st.sets(st.integers(0, V - 1), max_size=3),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=B, max_size=B),
    st.integers(0, 2**32 - B),
)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(requests)
def test_any_request(request):
    prompts, limits, stops, temperature, seed = request
    sampling = sampling_of(seed=seed, temperature=temperature, stop_token_ids=sorted(stops))
    truth, _ = decode_oracle(toy, table, prompts, limits, sampling, S)
    assert generate(plain, limits, sampling, prompts)[0] == truth
    assert generate(level(toy, table, script(truth, "mostly"), G), limits, sampling, prompts)[0] == truth


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
@pytest.mark.parametrize("draft", ["", "own"], ids=["plain", "drafted"])
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
