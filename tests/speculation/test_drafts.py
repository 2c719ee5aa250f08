"""Drafts of every quality and length change nothing but the counts (C8, C10)."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import MIXED, PENALIZED, PROMPTS, B, G, S, V, generate, plain, sampling_of, script, table, toy
from oracles import decode_oracle
from toys import level, logprob_rows

from mlspecqd_jax.speculation.buffers import SLACK


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
