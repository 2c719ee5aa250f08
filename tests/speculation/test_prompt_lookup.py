"""Prompt look-up against a brute-force oracle, and as the innermost drafter of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import MIXED, PROMPTS, B, V, assert_equal_to_plain, generate, limits_of, sampling_of, stack_of, table, toy
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import lookup_oracle
from toys import Markov, ask_of, level, quick_jit, ragged

from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup
from mlspecqd_jax.speculation.protocols import Sequences
from mlspecqd_jax.speculation.settings import Sampling

SIZE, G = 24, 5
NGRAMS = [(3, 1), (1, 1), (3, 3), (4, 2)]


def propose_of(drafter, rule="coupled", draft_len=G):
    def propose(tokens, length, limit, sampling):
        sequences = Sequences(tokens, length)
        return drafter.propose(None, ask_of(sequences, limit, draft_len), sampling)[0]

    return quick_jit(propose), Sampling.create(8, V, rule=rule)


compiled = {ngrams: propose_of(PromptLookup(*ngrams)) for ngrams in NGRAMS}


def assert_as_the_oracle(prompts, limits, ngrams, filler=0):
    propose, sampling = compiled[ngrams]
    draft = propose(*ragged(prompts, SIZE, filler), jnp.asarray(limits, jnp.int32), sampling)
    for r, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        expected = lookup_oracle(prompt, G, *ngrams)
        assert draft.length[r] == (limit if expected else 0)
        assert draft.tokens[r, : draft.length[r]].tolist() == expected[: draft.length[r]]
    assert draft.probs is None


def test_golden_cases():
    """The longest n-gram decides, then the latest occurrence; what reaches into the proposal repeats."""
    cases = {
        (1, 2, 3, 9, 1, 2): [3, 9, 1, 2, 3],  # longest is 2: 1 2
        (5, 1, 2, 3, 7, 2, 3, 8, 5, 1, 2, 3): [7, 2, 3, 8, 5],  # 1 2 3 beats the later 2 3
        (1, 4, 1, 5, 1): [5, 1, 5, 1, 5],  # the latest 1, and its period of two
        (6, 6): [6] * 5,
        (6,): [],
        (1, 2, 3): [],
        (3, 1, 2, 1, 2): [1, 2, 1, 2, 1],
        tuple(range(24)): [],  # as long as the buffer
    }
    prompts = [list(case) for case in cases]
    assert [lookup_oracle(prompt, G) for prompt in prompts] == list(cases.values())
    assert_as_the_oracle(prompts, [G] * 8, (3, 1))
    assert_as_the_oracle(prompts, [G] * 8, (3, 1), filler=6)  # what lies beyond a row is not looked at


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=SIZE), min_size=8, max_size=8)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(sequences, st.lists(st.integers(0, G), min_size=8, max_size=8), st.sampled_from(NGRAMS), st.integers(0, 2))
def test_equal_to_trying_everything(prompts, limits, ngrams, filler):
    assert_as_the_oracle(prompts, limits, ngrams, filler)


def test_under_rejection_it_is_certain_of_each_token():
    """Law 1."""
    propose, sampling = propose_of(PromptLookup(), "rejection")
    draft = propose(*ragged([[1, 2, 3, 1]] * 8, SIZE), jnp.full((8,), G), sampling)
    assert np.array_equal(draft.probs, np.eye(V)[np.asarray(draft.tokens)])
    assert draft.tokens[0].tolist() == [2, 3, 1, 2, 3]


def test_it_keeps_nothing_and_hands_the_verifiers_cache_back():
    drafter, cache, propose = PromptLookup(), object(), []
    assert jax.tree.leaves(drafter) == []

    def trace(tokens, length):
        ask = ask_of(Sequences(tokens, length), length, 2, cache)
        state = drafter.feed(drafter.init(1, SIZE), tokens, length, ask.lent)
        propose.append(drafter.propose(state, ask, Sampling.create(1, V)))

    jax.eval_shape(trace, *ragged([[1, 2, 1]], SIZE))
    assert propose[0][1] is None
    assert propose[0][2].cache is cache


@pytest.mark.parametrize(
    ("ngrams", "message"),
    [
        ((2, 3), "1 <= min_ngram <= max_ngram"),
        ((0, 0), "max_ngram is 0, but must be a whole number from 1 to 64"),
        ((3, 0), "min_ngram is 0, but must be a whole number from 1 to 64"),
        ((3, -1), "min_ngram is -1, but must be a whole number from 1 to 64"),
    ],
)
def test_lengths_out_of_order_or_range_are_refused(ngrams, message):
    with pytest.raises(ValueError, match=message):
        PromptLookup(*ngrams)


@pytest.mark.parametrize("ngrams", [(2.0, 1), ("3", 1), (True, 1), (3, None)])
def test_lengths_that_are_no_whole_numbers_are_refused(ngrams):
    with pytest.raises(ValueError, match="whole number"):
        PromptLookup(*ngrams)


def test_alone_below_a_target():
    """Law 5, and what it is for: text that repeats takes few rounds, down to prompts of one token."""
    small = Markov(V, order=1)  # its greedy text has a period of at most V
    plain, stack = level(small, small.table(0)), level(small, small.table(0), PromptLookup(), 4)
    sampling = sampling_of(temperature=np.resize([0, 0, 1], B), seed=1)
    truth, _ = generate(plain, limits_of(32), sampling)
    ours, state = generate(stack, limits_of(32), sampling)
    assert ours == truth
    rounds = np.asarray(state.counts.rounds)
    assert np.all(rounds[np.asarray(sampling.temperature) == 0] <= V + 1 + 32 // 5)  # the period once, then whole rounds


@pytest.mark.slow
def test_at_the_bottom_of_a_stack():
    """Law 5: whatever is found, and where nothing is, as in prompts without a repetition."""
    drafts = [table, toy.table(1)]
    for drafted in drafts:
        state = assert_equal_to_plain(stack_of("shared>ngram", [drafted]), limits_of(), sampling_of(seed=3, **MIXED))
        looked_up = state.below.counts
        assert looked_up.drafted.sum() > 0
        assert 0 < looked_up.accepted.sum() < looked_up.drafted.sum()
    assert any(not lookup_oracle(prompt, 1) for prompt in PROMPTS)
    assert len(PROMPTS[0]) == 1
