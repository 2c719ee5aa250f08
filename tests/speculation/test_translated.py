"""Drafts that read and score other tokens than the target's: what they are fed and mean, and the laws with them in a stack."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import MIXED, PROMPTS, B, S, V, assert_equal_to_plain, generate, limits_of, sampling_of, shared_toy, table, toy
from other_tokens import Renumbered, Stuttering, dictionary_of, translated
from toys import Toy, chain, level_counts, quick_jit, ragged, rows, run

from mlspecqd_jax.speculation.control import Fixed
from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.protocols import PADDING
from mlspecqd_jax.speculation.translated import Translated, TranslatedParams

ORDER = (3, 6, 1, 0, 7, 5, 2, 4)
renumbered, stuttering = Renumbered(toy, ORDER), Stuttering(toy)
target = shared_toy, (table, jnp.int32(0))
# Of one to four own tokens each, and with a token that has none, two that are alike, and two that only begin or end others.
SPELLED = [(0,), (1, 2), (), (3,), (3,), (2, 2, 1, 0), (4,), (1, 4)]


def below_target(draft, draft_len=4):
    return Level(*target, draft, draft_len)


def logits_of(small, letters, dictionary, tokens):
    """Return the logits [V] after a list of the target's tokens, and the own tokens that spell them, in plain Python."""
    first, ids, counterpart, opening = (np.asarray(x).tolist() for x in dictionary)
    own = [*opening, *itertools.chain.from_iterable(ids[first[t] : first[t + 1]] for t in tokens)]
    logits = small.truth(letters, own)
    return np.array([logits[i] if i >= 0 else -np.inf for i in counterpart]), own


@pytest.mark.parametrize("opening", [pytest.param((), marks=pytest.mark.slow), (4, 0)])
def test_it_scores_what_spells_the_targets_tokens(opening):
    """Law 2: in windows of any width, at starts of each row's own, fed again after others were tried there, with padding."""
    small, rng = Toy(6), np.random.default_rng(0)
    letters, dictionary = small.table(5), dictionary_of(SPELLED, opening=opening)
    scorer, params = Translated(small, V, stretch=2.0), TranslatedParams(letters, dictionary)
    score, batch, size = quick_jit(scorer.__call__), 4, 60
    cache = scorer.init_cache(params, batch, size)
    assert cache.scorer.shape == (batch, 256)
    texts, checked = [[] for _ in range(batch)], 0
    for width in (1, 1, 2, 5, 1, 9, 2, 2, 5, 1, 9, 9):
        start = np.array([max(len(row) - rng.integers(3), 0) for row in texts], np.int32)  # up to two are replaced
        known = rng.integers(1, width + 1, size=batch)
        window = rng.choice([0, 1, 2, 3, 4, 5, 7], size=(batch, width)).astype(np.int32)
        window[np.arange(width) >= known[:, None]] = PADDING
        scored = score(params, jnp.asarray(window), jnp.asarray(start), cache)
        cache = scored.cache
        assert scored.logits.shape == (batch, width, V)
        for r in range(batch):
            texts[r] = texts[r][: start[r]]
            for w in range(known[r]):
                before = logits_of(small, letters, dictionary, texts[r])[1] if texts[r] else []
                texts[r].append(int(window[r, w]))
                expected, own = logits_of(small, letters, dictionary, texts[r])
                silent = not SPELLED[window[r, w]] and (len(own) == len(before)) and all(not SPELLED[t] for t in window[r, :w])
                found = np.full(V, -np.inf) if silent else expected
                np.testing.assert_array_equal(scored.logits[r, w], found.astype(np.float32))
                assert cache.ends[r, start[r] + w] == len(own)
                checked += 1
    assert checked > 80


def decoded(draft, limits, sampling, prompts=PROMPTS, most=4):
    """Return (rows, state) of prompts that are fed in several pieces, where the draft may draft `most` tokens a round."""
    batch = *ragged(prompts, S, toy.alarm), jnp.asarray(limits, jnp.int32), sampling
    control = Fixed.create(B, draft_limit=most)
    tokens, length, state = run(below_target(draft), *batch, control=control, prefill_width=8)
    return rows(tokens, length), state


def stutters(before, params=table, silent=()):
    return translated(stuttering, params, stuttering.spelled(before, silent), V, stretch=3.0)


def plainly(limits, sampling, prompts=PROMPTS):
    return generate(Level(*target), limits, sampling, prompts)[0]


LONG = [[*prompt, *prompt[::-1], *prompt] for prompt in PROMPTS]  # in up to nine pieces
BEFORE = (0, 1, 0, 2, 1, 0, 3, 0)


def test_tokens_that_are_several_of_the_drafts_are_caught_up_with():
    """Law 4: a model with its tokens renumbered drafts as itself, in as many passes as the row takes that is spelled longest."""
    sampling, limits = sampling_of(seed=3, **MIXED), limits_of(prompts=LONG)
    ours, state = decoded(stutters(BEFORE), limits, sampling, LONG)
    assert ours == plainly(limits, sampling, LONG)
    assert state.counts.accepted.sum() == state.counts.drafted.sum() > 0
    assert np.array_equal(state.counts.rounds, -(-(state.length - state.begin) // 5))


def test_whatever_it_means_the_text_is_plain_decodings():
    """Laws 5 and 6: other weights, tokens that are never meant, logits that are no numbers."""
    sampling, limits = sampling_of(seed=3, **MIXED), limits_of()
    truth = plainly(limits, sampling)
    for params, silent in [(toy.table(9), (2,)), (table, (0, 3, 5)), (jnp.full_like(table, jnp.nan), ()), (table, range(V))]:
        ours, state = decoded(stutters(BEFORE, params, silent), limits, sampling)
        assert ours == truth
        assert state.counts.drafted.sum() > state.counts.accepted.sum()


def test_limits_of_drafts_hold():
    """C12."""
    sampling, limits, most = sampling_of(seed=1), limits_of(), np.resize([0, 1, 2, 4], B).tolist()
    ours, state = decoded(stutters(BEFORE), limits, sampling, most=most)
    assert ours == plainly(limits, sampling)
    assert (np.asarray(state.counts.judged) > 0).sum(axis=1).tolist() == most
    assert state.counts.accepted.sum() == state.counts.drafted.sum()


@pytest.mark.slow
def test_prompts_are_fed_without_logits():
    """Law 8: a piece of a prompt reads no head, in any of the passes that it takes."""
    draft, start = stutters(BEFORE), jnp.zeros((B,), jnp.int32)
    cache = draft.model.init_cache(draft.params, B, S)

    def text(function):
        return jax.jit(function).lower(draft, jnp.zeros((B, 8), jnp.int32), start, cache).compile().as_text()

    logits = f"f32[{B},8,{V + 1}]"  # the draft's own, which the loop would carry
    assert logits in text(lambda *given: given[0].score(*given[1:]))
    assert logits not in text(lambda *given: given[0].score(*given[1:]).cache)


@pytest.mark.slow
def test_tokens_that_are_all_several_of_the_drafts():
    """Law 4: none of what it drafts is one token of its own."""
    sampling, limits = sampling_of(seed=3, **MIXED), limits_of(prompts=LONG)
    ours, state = decoded(stutters((2,) * V), limits, sampling, LONG)
    assert ours == plainly(limits, sampling, LONG)
    assert state.counts.accepted.sum() == state.counts.drafted.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["coupled", pytest.param("rejection", marks=pytest.mark.exhaustive)])
def test_a_model_with_its_tokens_renumbered_drafts_as_itself(rule):
    """Law 4: the target accepts what it does of the ordinary draft, also where this one would rather say what nobody else can."""
    sampling, itself = sampling_of(rule=rule, seed=7, **MIXED), chain("own", [table, table], [4], shared_toy)
    truth, ordinary = generate(itself, limits_of(), sampling)
    for scorer in (renumbered, Renumbered(toy, ORDER, more=3)):
        ours, state = generate(below_target(translated(scorer, table, scorer.dictionary, V)), limits_of(), sampling)
        assert ours == truth
        for mine, theirs in zip(level_counts(state), level_counts(ordinary), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert state.counts.accepted.sum() == state.counts.drafted.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["coupled", pytest.param("rejection", marks=pytest.mark.exhaustive)])
def test_levels_below_draft_in_the_targets_tokens(rule):
    """Laws 3 and 4: a twin that shares the cache, and look-up under a draft that keeps its own."""
    spelling = stuttering.spelled(BEFORE)
    twin = translated(stuttering, table, spelling, V, share_cache=True, stretch=3.0)
    sampling = sampling_of(rule=rule, seed=7, **MIXED)
    for drafter in (twin, PromptLookup()):
        stack = below_target(translated(stuttering, table, spelling, V, drafter, 2, stretch=3.0), 6)
        ours, state = generate(stack, limits_of(), sampling)
        judges = level_counts(state)[: 2 if drafter is twin else 1]
        assert all(counts.accepted.sum() == counts.drafted.sum() > 0 for counts in judges)
        if rule == "coupled":
            assert ours == plainly(limits_of(), sampling)


@pytest.mark.slow
def test_a_text_that_outgrows_the_drafts_positions_is_plain_decodings():
    """Law 5."""
    sampling, limits = sampling_of(seed=3, **MIXED), np.array(limits_of())
    short = below_target(translated(renumbered, table, renumbered.dictionary, V, max_positions=30))
    state = assert_equal_to_plain(short, limits, sampling)
    accepted, drafted = np.asarray(state.counts.accepted).sum(axis=1), np.asarray(state.counts.drafted)
    assert np.array_equal(accepted[limits <= 30], drafted[limits <= 30])
    assert np.all(accepted[limits > 40] < drafted[limits > 40])
