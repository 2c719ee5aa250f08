"""Law 5: any stack gives what plain decoding gives, whatever is below the target, broken drafts included.

Plain decoding itself is proved against a Python loop in test_loop.py, equality in distribution in test_joint.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from chains import (
    CHAINS,
    GREEDY,
    MIXED,
    PROMPTS,
    B,
    S,
    V,
    assert_equal_to_plain,
    generate,
    limits_of,
    plain,
    sampling_of,
    shared_toy,
    stack_of,
    table,
    toy,
    with_models,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import MODULUS, Toy, chain, level_counts, ragged, rows, run

from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.level import Level

slow = pytest.mark.slow
FAST = ["own", "shared", "shared>ngram"]
MORE = ["own>shared", "shared>own"]  # the others only in the exhaustive set
NAMES = [pytest.param(name, marks=[] if name in FAST else slow if name in MORE else pytest.mark.exhaustive) for name in CHAINS]


some = np.random.default_rng(3).random((MODULUS, 1)) < 0.3
BROKEN = {
    "random": toy.table(9),
    "constant": jnp.zeros_like(table),
    "always wrong": -table,
    "NaN": jnp.full_like(table, jnp.nan),
    "+inf": jnp.full_like(table, jnp.inf),
    "-inf": jnp.full_like(table, -jnp.inf),
    "huge": table * jnp.float32(1e36),
    "one NaN": table.at[:, 2].set(jnp.nan),
    "one +inf": table.at[:, 2].set(jnp.inf),
    "NaN in some rows": jnp.where(some, jnp.nan, table),
    "inf in some rows": jnp.where(some, jnp.inf, table),
    "-inf in some rows": jnp.where(some, -jnp.inf, table),
}


@pytest.mark.parametrize("name", NAMES)
def test_any_draft_gives_what_plain_decoding_gives(name):
    """Greedy and coupled, every setting mixed by row; each kind of draft at all levels at once, then at one beside good ones."""
    for choice in (GREEDY, MIXED):
        sampling = sampling_of(seed=11, stop_token_ids=[5], **choice)
        for kind in BROKEN:
            below = with_models(name) - 1
            for where in {(True,) * below, *map(tuple, np.eye(below, dtype=bool).tolist())}:
                tables = [BROKEN[kind] if bad else table for bad in where]
                state = assert_equal_to_plain(stack_of(name, tables), limits_of(), sampling)
                accepted, drafted = state.counts.accepted.sum(), state.counts.drafted.sum()
                if not where[0]:  # what is below a draft does not change it either
                    assert accepted == drafted
                elif kind == "always wrong" and not choice:
                    assert accepted == 0
                elif kind in ("random", "NaN in some rows"):
                    assert 0 < accepted < drafted


@slow
@pytest.mark.parametrize(
    "name",
    ["own>shared", pytest.param("shared>own", marks=pytest.mark.exhaustive), pytest.param("own>own", marks=pytest.mark.exhaustive)],
)
def test_greedy_rows_are_plain_under_the_rejection_rule(name):
    """Also beside sampled ones; and whatever the draft, nothing undrawable is drawn."""
    greedy = [r for r in range(B) if MIXED["temperature"][r] == 0]
    for kind in BROKEN:
        stack = stack_of(name, [BROKEN[kind]] * 2)
        assert_equal_to_plain(stack, limits_of(), sampling_of(rule="rejection", seed=11))
        sampling = sampling_of(rule="rejection", seed=11, **MIXED)
        out, state = generate(stack, limits_of(), sampling)
        truth, _ = generate(plain, limits_of(), sampling)
        assert [out[r] for r in greedy] == [truth[r] for r in greedy]
        assert [len(row) for row in out] == limits_of()
        assert all(toy.alarm not in row[len(prompt) :] for row, prompt in zip(out, PROMPTS, strict=True))
        if kind in ("NaN", "+inf", "-inf"):  # certain of token 0, which the target accepts as often as it may choose it
            judged, accepted = (np.delete(getattr(state.counts, field), greedy, axis=0).sum() for field in ("judged", "accepted"))
            assert 0 < accepted < 0.5 * judged


@pytest.mark.parametrize("name", ["shared>own", pytest.param("own>shared>own", marks=slow)])
def test_stops_and_limits_cut_where_plain_decoding_would(name):
    """With drafts accepted in full, blocks are whole, and the ends fall on every offset within them; so do the buffer's."""
    block = CHAINS[name][0] + 1
    sampling = sampling_of(seed=7, **MIXED)
    for limits in ([len(p) + r for r, p in enumerate(PROMPTS)], [S - SLACK - 1] * B, [10**6] * B):
        state = assert_equal_to_plain(stack_of(name), limits, sampling)
        assert set((np.asarray(state.length - state.begin) % block).tolist()) == set(range(block))
        assert not state.ended.any()
    ended_at = set()
    for stops in ([0], [1], [2], [3], [4], [5], [6], [1, 4], [0, 3, 6]):
        state = assert_equal_to_plain(stack_of(name), limits_of(), sampling_of(seed=7, stop_token_ids=stops, **MIXED))
        ended_at |= set((np.asarray(state.length - state.begin) % block)[np.asarray(state.ended)].tolist())
        for counts in level_counts(state):  # also in drafts, which a stop token ends
            assert np.array_equal(counts.accepted.sum(axis=1), counts.drafted)
    assert ended_at == set(range(block))


@slow
@pytest.mark.parametrize("rule", ["coupled", pytest.param("rejection", marks=pytest.mark.exhaustive)])
def test_padded_vocabularies(rule):
    """C9: a draft's logits are cut or padded to the target's vocabulary; the target's own are never masked."""
    larger, smaller = Toy(V + 2), Toy(V - 2)

    def stack_for(target):
        # What the larger vocabulary adds is what it would always choose, were it not cut; what the smaller lacks is never chosen.
        extended = jnp.pad(target, ((0, 0), (0, 2)), constant_values=50)
        return Level(toy, target, Level(larger, extended, Level(smaller, target[:, : V - 2]), 2), 5)

    unused = table.at[:, V - 2].set(-60)
    choice = {k: v for k, v in MIXED.items() if k != "logit_bias"}
    sampling = sampling_of(rule=rule, seed=7, **choice)
    _, _, state = run(stack_for(unused), *arguments(sampling))
    for counts in level_counts(state):
        assert np.array_equal(counts.accepted, counts.judged)
    assert state.counts.rounds.tolist() == [-(-(20 + r % 9) // 6) for r in range(B)]

    tokens, length, state = run(stack_for(table), *arguments(sampling))
    assert V - 2 in np.concatenate(rows(tokens[:, 8:], length - 8))
    inner = state.below.counts
    assert 0 < inner.accepted.sum() < inner.judged.sum()  # the level between, which draws what the smaller one cannot
    assert np.array_equal(state.counts.accepted, state.counts.judged)
    if rule == "coupled":
        assert rows(tokens, length) == generate(plain, limits_of(), sampling)[0]


def arguments(sampling):
    return *ragged(PROMPTS, S, toy.alarm), jnp.asarray(limits_of(), jnp.int32), sampling


requests = st.tuples(
    st.lists(st.lists(st.integers(0, V - 2), min_size=1, max_size=20), min_size=B, max_size=B),
    st.lists(st.integers(0, 70), min_size=B, max_size=B),
    st.sets(st.integers(0, V - 1), max_size=3),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=B, max_size=B),
    st.lists(st.sampled_from([0.5, 0.9, 1.0]), min_size=B, max_size=B),
    st.integers(0, 2**32 - B),
    st.lists(st.sampled_from(["good", *BROKEN]), min_size=3, max_size=3),
)


def check_request(stack_from, request):
    prompts, limits, stops, temperature, top_p, seed, kinds = request
    tables = [table if kind == "good" else BROKEN[kind] for kind in kinds]
    sampling = sampling_of(seed=seed, temperature=temperature, top_p=top_p, stop_token_ids=sorted(stops))
    assert_equal_to_plain(stack_from(tables), limits, sampling, prompts)


@pytest.mark.slow
@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.sampled_from([*FAST, "own>shared>own"]), requests)
def test_any_request(name, request):
    """Law 5 over depths, prompts, limits, stops, temperatures, seeds and drafts, on stacks that are compiled already."""
    check_request(lambda tables: stack_of(name, tables[: with_models(name) - 1]), request)


@st.composite
def structures(draw):
    names = draw(st.lists(st.sampled_from(["own", "shared"]), min_size=1, max_size=3))
    if len(names) < 3 and draw(st.booleans()):
        names.append("ngram")
    return ">".join(names), draw(st.lists(st.integers(1, 7), min_size=len(names), max_size=len(names)))


@pytest.mark.exhaustive
@settings(max_examples=8, derandomize=True, deadline=None)
@given(structures(), requests)
def test_any_structure(structure, request):
    """Law 5 over the names and draft_lens of stacks too, each a compilation of its own."""
    name, draft_lens = structure
    check_request(lambda tables: chain(name, [table, *tables[: with_models(name) - 1]], draft_lens, shared_toy), request)
