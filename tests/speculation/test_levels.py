"""Levels: what they hand up (law 1, C3, C5), rows apart from each other (law 6), one trace (law 7), and refusals (C9)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import (
    CHAINS,
    MIXED,
    PROMPTS,
    B,
    S,
    V,
    counts_of_rows,
    generate,
    limits_of,
    near,
    sampling_of,
    stack_of,
    table,
    toy,
    with_models,
)
from oracles import adjust_oracle, filtered_oracle, softmax
from toys import Toy, ask_of, level_counts, pick_rows, quick_jit, ragged, run

from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.loop import init
from mlspecqd_jax.speculation.protocols import Sequences
from mlspecqd_jax.speculation.settings import Sampling

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


def unlike(name):
    """Return a chain whose drafts are accepted now and then, at every level."""
    return stack_of(name, [near(1), near(2), near(3)][: with_models(name) - 1])


# Law 1


@quick_jit
def jit_propose(stack, state, cache, sequences, sampling, wanted):
    draft, state, lent = stack.drafter.propose(
        state, ask_of(sequences, wanted, stack.draft_len, cache, len(stack.draft_lens) - 1), sampling
    )
    return draft, state, lent.cache


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", ["own>shared", pytest.param("shared>own", marks=slow)])
def test_a_level_hands_up_its_own_models_probabilities(name):
    """Law 1: at the prefix that it drafted itself, whatever drafted below it."""
    stack, (draft_len, _) = unlike(name), CHAINS[name]
    sampling = sampling_of(rule="rejection", seed=3, stop_token_ids=[5], **MIXED)
    sampling = dataclasses.replace(sampling, prompt_length=jnp.asarray([len(p) for p in PROMPTS]))
    begun = quick_jit(init)(stack, *ragged(PROMPTS, S, toy.alarm), sampling)
    state, cache, prefixes = begun.below, begun.cache, PROMPTS
    limit = np.resize([draft_len, draft_len, 2, 0], B)
    own_table = np.asarray(stack.drafter.params[0])
    s = jax.tree.map(np.asarray, sampling)
    for _ in range(2):
        tokens, length = ragged(prefixes, S, toy.alarm)
        draft, state, cache = jit_propose(stack, state, cache, Sequences(tokens, length), sampling, limit)
        checked = 0
        for r, prefix in enumerate(prefixes):
            drafted = draft.tokens[r, : draft.length[r]].tolist()
            assert 5 not in drafted[:-1]
            assert len(drafted) == limit[r] or drafted[-1] == 5
            for i in range(len(drafted)):
                row = prefix + drafted[:i]
                penalties = s.repetition_penalty[r], s.presence_penalty[r], s.frequency_penalty[r]
                logits = adjust_oracle(toy.truth(own_table, row), row, len(PROMPTS[r]), *penalties, enumerate(s.logit_bias[r]))
                if s.temperature[r] == 0:
                    truth = np.eye(V)[np.argmax(logits)]
                else:
                    kept, doubtful = filtered_oracle(logits, s.temperature[r], s.top_k[r], s.top_p[r], s.min_p[r])
                    assert not doubtful
                    truth = softmax(kept)
                np.testing.assert_allclose(draft.probs[r, i], truth, atol=1e-5)
                assert draft.probs[r, i, drafted[i]] > 0
                checked += 1
        assert checked > B
        # As after a verifier that redraws one token, or that accepts all and adds one (which a twin's verifier would feed first).
        kept = [int(n) if r % 2 and name.startswith("own") else int(n) // 2 for r, n in enumerate(draft.length)]
        prefixes = [prefix + draft.tokens[r, : kept[r]].tolist() + [r % 5] for r, prefix in enumerate(prefixes)]


def test_no_probabilities_are_kept_under_the_coupled_rule():
    """C5."""
    stack = stack_of("own>shared")
    sampling = sampling_of()
    tokens, length = ragged(PROMPTS, S)

    def propose(rule):
        settings = dataclasses.replace(sampling, rule=rule)
        state = init(stack, tokens, length, settings)
        ask = ask_of(Sequences(tokens, length), jnp.full((B,), 5), 5, state.cache, len(stack.draft_lens) - 1)
        return stack.drafter.propose(state.below, ask, settings)[0].probs

    assert jax.eval_shape(lambda: propose("coupled")) is None
    assert jax.eval_shape(lambda: propose("rejection")).shape == (B, 5, V)


# Law 6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), [("shared>own", "coupled"), pytest.param("own>shared", "rejection", marks=exhaustive)])
def test_no_row_depends_on_its_neighbours(name, rule):
    """Law 6: neither its tokens nor what is accepted of its drafts, at any level."""
    stack = unlike(name)
    sampling = sampling_of(rule=rule, seed=5, stop_token_ids=[5], **MIXED)
    truth, state = generate(stack, limits_of(), sampling)
    expected = [counts_of_rows(state, r) for r in range(B)]
    assert all(0 < counts.accepted.sum() < counts.judged.sum() for counts in level_counts(state)[:-1])

    order = np.random.default_rng(0).permutation(B)
    strangers = sampling_of(rule=rule, seed=900, temperature=np.resize([1, 0, 2], B), top_k=3, stop_token_ids=[5])
    for stay in (np.arange(B) % 2 == 0, np.arange(B) % 4 == 1, np.arange(B) == 3, np.arange(B) == 12):
        # Other rows in other places: prompts, limits and settings of strangers.
        place = [r if stay[r] else None for r in order]
        prompts = [[6, 1, 2] * (1 + i % 5) if r is None else PROMPTS[r] for i, r in enumerate(place)]
        limits = [15 + 3 * i if r is None else limits_of()[r] for i, r in enumerate(place)]
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]) if jnp.ndim(a) else a, sampling, strangers)
        both = dataclasses.replace(both, stop_token_ids=sampling.stop_token_ids)
        mixed = pick_rows(both, [B + i if r is None else r for i, r in enumerate(place)])
        out, state = generate(stack, limits, mixed, prompts)
        for i, r in enumerate(place):
            if r is not None:
                assert out[i] == truth[r]
                assert counts_of_rows(state, i) == expected[r]


@slow
@pytest.mark.parametrize(("name", "rule"), [("own>shared", "rejection"), pytest.param("shared>own", "coupled", marks=exhaustive)])
def test_a_row_alone_is_that_row_in_a_batch(name, rule):
    """Law 6, for a batch of one."""
    stack = unlike(name)
    sampling = sampling_of(rule=rule, seed=5, stop_token_ids=[5], **MIXED)
    truth, state = generate(stack, limits_of(), sampling)
    for r in range(B):
        out, alone = generate(stack, limits_of()[r : r + 1], pick_rows(sampling, [r]), PROMPTS[r : r + 1])
        assert out == [truth[r]]
        assert counts_of_rows(alone, 0) == counts_of_rows(state, r)


# Law 7


@pytest.mark.slow
def test_one_trace_for_many_requests():
    """Law 7: other prompts, limits, sampling values, seeds and weights are no other program."""
    rng = np.random.default_rng(0)
    for name, rule in (("shared", "coupled"), ("shared>own", "coupled"), ("own>shared", "rejection")):
        generate(stack_of(name), limits_of(), sampling_of(rule=rule))
        traced = run._cache_size()
        for seed in range(3):
            prompts = [rng.integers(V - 1, size=n).tolist() for n in rng.integers(1, 20, size=B)]
            values = {"temperature": rng.random(B), "top_k": rng.integers(9, size=B), "min_p": rng.random(B), "seed": seed}
            sampling = sampling_of(rule=rule, stop_token_ids=[seed], **values)
            generate(unlike(name), rng.integers(70, size=B), sampling, prompts)
        assert run._cache_size() == traced
    generate(stack_of("shared"), [9], sampling_of(1), [[1, 2]])  # another batch size is one
    assert run._cache_size() == traced + 1


# Refusals


def test_a_window_that_does_not_fit_at_its_depth_is_refused():
    bottom = Level(toy, table)
    wide = Level(toy, table, bottom, 62)  # 63 rows, and one more for each level above
    Level(toy, table, wide, 1)
    with pytest.raises(ValueError, match="draft_len 62 needs a window of 65 positions; at most 64"):
        Level(toy, table, Level(toy, table, wide, 1), 1)
    with pytest.raises(ValueError, match="draft_len 63 needs a window of 65 positions"):
        Level(toy, table, Level(toy, table, bottom, 63), 1)
    with pytest.raises(ValueError, match="window of 80 positions"):
        Level(toy, table, Level(toy, table, PromptLookup(), 63, window_multiple=40), 1)


def test_sharing_the_cache_of_another_model_is_refused():
    other = Level(Toy(V, order=3), table, share_cache=True)
    with pytest.raises(ValueError, match="only if it is the same model"):
        Level(toy, table, other, 2)
    Level(toy, table, dataclasses.replace(other, share_cache=False), 2)
    Level(toy, table, dataclasses.replace(other, model=toy), 2)


def test_an_outermost_level_without_a_cache_is_refused():
    """It has no verifier to share one with."""
    with pytest.raises(ValueError, match="outermost level has no verifier whose cache it could share"):
        init(Level(toy, table, share_cache=True), *ragged([[1]], S), Sampling.create(1, V))


def test_sampling_for_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="sampling is for a vocabulary of 9, but the target's has 8"):
        init(stack_of("own"), *ragged(PROMPTS, S), Sampling.create(B, V + 1))
    # A draft's vocabulary may differ (C9).
    drafter = Level(Toy(V + 1), Toy(V + 1).table(0))
    jax.eval_shape(lambda: init(Level(toy, table, drafter, 2), *ragged(PROMPTS, S), Sampling.create(B, V)))
