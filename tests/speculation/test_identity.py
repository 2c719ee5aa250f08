"""Law 4: with every draft equal to its verifier, every draft is accepted in full.

A bug in a draft's cache never changes the output, only what is accepted, so this is the only test that sees it. Each way of getting
the catch-up wrong is tried at the end, and heard.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from chains import (
    CHAINS,
    GREEDY,
    LENGTHS,
    MIXED,
    PROMPTS,
    S,
    generate,
    limits_of,
    plain,
    sampling_of,
    stack_of,
    toy,
    with_models,
)
from toys import level_counts, quick_jit, ragged, rows

from mlspecqd_jax.speculation import level as levels
from mlspecqd_jax.speculation import round as rounds
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.loop import advance, generate_tokens

jit_advance = quick_jit(advance)

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
# The recursion is one for both rules, and the coupled one compiles faster.
CHEAP = [(name, "coupled") for name in ("own", "shared", "shared>ngram")]
DEEPEST = "own>shared>own"
CASES = [
    pytest.param(
        name, rule, marks=[] if (name, rule) in CHEAP else [slow if name in (DEEPEST, "own>shared", "shared>own") else exhaustive]
    )
    for rule in ("coupled", "rejection")
    for name in CHAINS
]


def whole_rounds(new, draft_lens):
    """Count the rounds of each level that `new` tokens take where every draft is accepted in full."""
    count = [0] * (len(draft_lens) + 1)

    def run(level, missing):
        while missing > 0:
            draft_len = draft_lens[level] if level < len(draft_lens) else 0
            useful = min(draft_len, missing - 1)
            count[level] += 1
            run(level + 1, useful)
            missing -= useful + 1

    run(0, new)
    return count


def assert_accepted_in_full(name, state, begin=0, counts_before=None):
    """Assert that from the lengths `begin` on, drafts were as long as was of use, and accepted throughout."""
    new = np.asarray(state.length) - (begin if counts_before else np.asarray(state.begin))
    expected = np.array([whole_rounds(int(n), CHAINS[name]) for n in new])  # [B, levels]
    for i, counts in enumerate(level_counts(state)):
        judging_a_model = i + 1 < with_models(name)
        if judging_a_model:
            assert np.array_equal(counts.accepted, counts.judged)
            assert np.array_equal(counts.accepted.sum(axis=1), counts.drafted)
        if with_models(name) == 1 + len(CHAINS[name]) or i == 0:  # how long an n-gram's rounds are depends on what it finds
            rounds = counts.rounds - (counts_before[i].rounds if counts_before else 0)
            assert rounds.tolist() == expected[:, i].tolist(), f"level {i}"


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_every_draft_is_accepted_in_full(name, rule):
    """Law 4: draft_len + 1 tokens a round at every level, for prompts of every length, also beside rows that finished early."""
    assert {1, 2, 3} < set(LENGTHS)
    stack = stack_of(name)
    for choice in (GREEDY, MIXED):
        sampling = sampling_of(rule=rule, seed=7, **choice)
        out, state = generate(stack, limits_of(), sampling)
        assert_accepted_in_full(name, state)
        assert state.counts.passes == max(whole_rounds(20 + offset, CHAINS[name])[0] for offset in range(9))
        if rule == "coupled" or not choice:
            assert out == generate(plain, limits_of(), sampling)[0]

    # Rows that finish early, or have nothing to do, while others go on.
    early = [limit if r % 3 else len(PROMPTS[r]) + r // 3 for r, limit in enumerate(limits_of())]
    out, state = generate(stack, early, sampling)
    assert [len(row) for row in out] == early
    assert_accepted_in_full(name, state)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param("shared>own", "coupled", marks=slow),
        pytest.param("own", "coupled", marks=exhaustive),
        pytest.param("own>shared", "rejection", marks=slow),
        pytest.param("own>own", "rejection", marks=exhaustive),
        pytest.param(DEEPEST, "coupled", marks=exhaustive),
    ],
)
def test_every_draft_is_accepted_in_full_after_a_resume(name, rule):
    """Law 4: also where the last round before had no use for a draft (limits one apart end it at every offset)."""
    stack = stack_of(name)
    sampling = sampling_of(rule=rule, seed=7, **MIXED)
    _, state = generate(stack, limits_of(), sampling)
    for more in (1, 2, 9):
        before, begin = level_counts(state), np.asarray(state.length)
        state = jit_advance(stack, state, jnp.asarray(begin + more), sampling, 100)
        assert np.array_equal(state.length, begin + more)
        assert_accepted_in_full(name, state, begin, before)
    if rule == "coupled":
        assert rows(state.tokens, state.length) == generate(plain, state.length, sampling)[0]


def cut_without_bonus(judged, length, limit, unfinished, stop_token_ids, real=rounds.kept):
    n, ended = real(judged, length, limit, unfinished, stop_token_ids)
    return jnp.where(unfinished, jnp.clip(judged.verdict.accepted, 1, n), 0), ended


def fed_otherwise(drafter_shares, change):
    """Return a `run_round` that begins elsewhere, for drafters that share their cache or those that do not."""
    real = levels.run_round

    def mutated(level, progress, limit, sampling, limits, depth=0, refeed=0, guide=None):
        if depth > 0 and level.share_cache == drafter_shares and (refeed > 0 or change < 0):
            progress, refeed = progress._replace(fed=progress.fed + change), max(refeed, refeed - change)
        return real(level, progress, limit, sampling, limits, depth, refeed, guide)

    return mutated


def without_prefill(level, state, tokens, start, lent, real=Level.feed):
    fed = real(level, state, tokens, start, lent)
    return fed if level.drafter else fed._replace(cache=state.cache)


QUICK = ("own cache fed one token less", "own cache not prefilled")
MUTATIONS = {
    "no bonus token": ("own", "kept", cut_without_bonus),
    "own cache fed one token less": ("own", "run_round", fed_otherwise(False, 1)),
    "own cache below a twin fed one token less": ("shared>own", "run_round", fed_otherwise(False, 1)),
    "twin below an own cache fed one token less": ("own>shared", "run_round", fed_otherwise(True, 1)),
    "own cache not prefilled": ("own", "Level.feed", without_prefill),
}


def run_mutated(monkeypatch, name, attribute, mutated, stack):
    monkeypatch.setattr(f"{(rounds if attribute == 'kept' else levels).__name__}.{attribute}", mutated)
    sampling = sampling_of(seed=7, **MIXED)
    tokens, length = ragged(PROMPTS, S, toy.alarm)
    mutated_run = quick_jit(lambda *arguments: generate_tokens(*arguments))  # traced anew
    return mutated_run(stack, tokens, length, jnp.asarray(limits_of(), jnp.int32), sampling)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in QUICK else [slow]) for kind in MUTATIONS])
def test_a_wrong_catch_up_is_heard(monkeypatch, kind):
    """Law 4 is seen to break, by acceptance alone: the output stays that of plain decoding (law 5)."""
    name, attribute, mutated = MUTATIONS[kind]
    tokens, length, state = run_mutated(monkeypatch, name, attribute, mutated, stack_of(name))
    with pytest.raises(AssertionError):
        assert_accepted_in_full(name, state)
    assert rows(tokens, length) == generate(plain, limits_of(), sampling_of(seed=7, **MIXED))[0]


@pytest.mark.slow
def test_a_twin_that_writes_below_its_verifiers_window_is_heard(monkeypatch):
    """Law 3: fed one token more than its verifier, it changes what the verifier reads, and so the output."""
    tokens, length, _ = run_mutated(monkeypatch, "shared", "run_round", fed_otherwise(True, -1), stack_of("shared"))
    out = rows(tokens, length)
    assert out != generate(plain, limits_of(), sampling_of(seed=7, **MIXED))[0]
    assert any(toy.alarm in row for row in out)
