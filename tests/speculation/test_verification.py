"""`verify` against the distribution it must keep: joint sequences of a toy conditional model, both rules, and broken variants."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from frequencies import count_sequences, g_test
from toys import quick_jit

from mlspecqd_jax.speculation.choosing import DRAW, RESIDUAL, draw, noise
from mlspecqd_jax.speculation.protocols import Draft
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.verification import verify

ROWS, G, V = 120_000, 2, 4


jit_verify = quick_jit(verify)  # the level is traced, and nearly all tests share one shape: little is compiled


@functools.partial(quick_jit, static_argnums=5)
def jit_verify_apart(logits, draft, position, sampling, depth, one_by_one):
    return verify(logits, draft, position, sampling, depth, True, one_by_one)


@quick_jit
def jit_choose(logits, t, sampling, purpose=DRAW):
    return draw(logits, noise(sampling.seed, t, 0, purpose), sampling)


def conditionals(seed, scale=1.2):
    """Random distributions of three tokens, each given those before: p0 [V], p1 [V, V], p2 [V, V, V]."""
    rng = np.random.default_rng(seed)
    logits = [scale * rng.normal(size=(V,) * (g + 1)) for g in range(G + 1)]
    return [np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in logits]


def pick(p, rng):
    """Draw one index a row of p [N, V]."""
    return np.minimum((rng.random(len(p))[:, None] > np.cumsum(p, axis=-1)).sum(axis=-1), V - 1)


def rows_given(model, tokens):
    """The model's distributions [N, G + 1, V] along the drafted tokens [N, G]."""
    first = np.broadcast_to(model[0], (len(tokens), V))
    return np.stack([first, model[1][tokens[:, 0]], model[2][tokens[:, 0], tokens[:, 1]]], axis=1).astype(np.float32)


def drafted(model, rng):
    """Draw G tokens from a model: (tokens [ROWS, G], their distributions [ROWS, G, V])."""
    first = pick(np.broadcast_to(model[0], (ROWS, V)), rng)
    tokens = np.stack([first, pick(model[1][first], rng)], axis=1).astype(np.int32)
    return tokens, rows_given(model, tokens)[:, :G]


def completed(tokens, accepted, target, rng):
    """Continue each row's accepted + 1 tokens by the target itself to three."""
    tokens = np.array(tokens)
    for g in range(1, G + 1):
        drawn = pick(target[1][tokens[:, 0]] if g == 1 else target[2][tokens[:, 0], tokens[:, 1]], rng)
        tokens[:, g] = np.where(g <= accepted, tokens[:, g], drawn)
    return tokens


def joint(model):
    return model[0][:, None, None] * model[1][:, :, None] * model[2]


def judged(target, tokens, probs, length, temperature=1.0, level=0):
    """Run `verify` over a batch of drafts; logits are scaled so that the given temperature restores the target."""
    logits = temperature * np.log(rows_given(target, tokens))
    sampling = Sampling.create(len(tokens), V, temperature=temperature, rule="rejection")
    draft = Draft(jnp.asarray(tokens), jnp.asarray(probs), jnp.asarray(length, jnp.int32))
    return jit_verify(jnp.asarray(logits), draft, jnp.full((len(tokens),), 9, jnp.int32), sampling, level)


def p_value(verdict, target, rng):
    """How well the rows, completed by the target, follow the target's joint distribution."""
    return g_test(count_sequences(completed(verdict.tokens, np.asarray(verdict.accepted), target, rng), V), joint(target))


def full(n=ROWS):
    return np.full(n, G)


@pytest.mark.parametrize("lengths", ["full", "random", "none"])
def test_rejection_keeps_the_joint_distribution(lengths):
    rng = np.random.default_rng(0)
    target, drafter = conditionals(1), conditionals(2)
    tokens, probs = drafted(drafter, rng)
    length = {"full": full(), "random": rng.integers(G + 1, size=ROWS), "none": 0 * full()}[lengths]
    verdict = judged(target, tokens, probs, length, temperature=0.7)
    accepted = np.asarray(verdict.accepted)
    assert np.all(accepted <= length)
    assert len(np.unique(accepted)) == np.max(length) + 1
    for g in range(G):
        assert np.array_equal(np.asarray(verdict.tokens)[accepted > g, g], tokens[accepted > g, g])
    assert p_value(verdict, target, rng) > 1e-3 / 3


def test_a_draft_from_another_distribution_than_handed_up_is_seen():
    """The drafter's law is needed, and the test sees when it is broken."""
    rng = np.random.default_rng(0)
    target = conditionals(1)
    tokens, _ = drafted(conditionals(2), rng)
    _, wrong = drafted(conditionals(3), rng)
    assert p_value(judged(target, tokens, wrong, full()), target, rng) < 1e-6


def reference(target, tokens, probs, rng, *, redraw="residual"):
    """The rule in numpy, with a choice of what is drawn after a rejection."""
    p = rows_given(target, tokens)
    q = np.pad(probs, ((0, 0), (0, 1), (0, 0)))
    at = np.arange(len(tokens))
    passed = [rng.random(len(tokens)) * q[at, g, tokens[:, g]] < p[at, g, tokens[:, g]] for g in range(G)]
    accepted = np.where(passed[0], np.where(passed[1], 2, 1), 0)
    left = np.maximum(p - q, 0) if redraw == "residual" else p
    left = left[at, accepted]
    out = np.pad(tokens, ((0, 0), (0, 1)))
    out[at, accepted] = pick(left / left.sum(axis=-1, keepdims=True), rng)
    return out, accepted


def test_redrawing_from_the_whole_distribution_is_seen():
    rng = np.random.default_rng(0)
    target = conditionals(1)
    tokens, probs = drafted(conditionals(2), rng)
    p_values = {}
    for redraw in ("residual", "all"):
        out, accepted = reference(target, tokens, probs, rng, redraw=redraw)
        p_values[redraw] = g_test(count_sequences(completed(out, accepted, target, rng), V), joint(target))
    assert p_values["residual"] > 1e-3
    assert p_values["all"] < 1e-6


def test_a_draft_equal_to_the_target_is_accepted_in_full():
    rng = np.random.default_rng(4)
    target = conditionals(1)
    tokens, probs = drafted(target, rng)
    length = rng.integers(G + 1, size=ROWS)
    verdict = judged(target, tokens, probs, length)
    # The softmax of logits may differ from the handed-up distribution in the last bit, and a coin in 2**23 falls between.
    assert np.mean(np.asarray(verdict.accepted) == length) > 1 - 1e-4
    assert p_value(verdict, target, rng) > 1e-3

    # The bonus token is what plain decoding draws there: noise is a function of the index, whatever was drafted before.
    bonus = np.asarray(verdict.tokens)[np.arange(ROWS), length]
    t = 9 + length[:, None].astype(np.int32)
    logits = np.log(rows_given(target, tokens))[np.arange(ROWS), length][:, None]
    plain = jit_choose(logits, t, Sampling.create(ROWS, V, temperature=1), RESIDUAL)[:, 0]
    assert np.mean((bonus == plain) | (np.asarray(verdict.accepted) < length)) > 1 - 1e-4


def test_a_disjoint_draft_is_rejected_and_redrawn_from_the_target():
    rng = np.random.default_rng(5)
    low, high = np.array([0.3, 0.7, 0, 0]), np.array([0, 0, 0.6, 0.4])
    target = [np.broadcast_to(low, (V,) * (g + 1)) for g in range(G + 1)]
    drafter = [np.broadcast_to(high, (V,) * (g + 1)) for g in range(G + 1)]
    with np.errstate(divide="ignore"):
        verdict = judged(target, *drafted(drafter, rng), full())
    assert not np.any(verdict.accepted)
    assert g_test(np.bincount(np.asarray(verdict.tokens)[:, 0], minlength=V), low) > 1e-3


def test_a_one_hot_draft_is_accepted_as_often_as_the_target_says():
    """What prompt look-up proposes."""
    rng = np.random.default_rng(6)
    target = conditionals(1)
    tokens = np.broadcast_to(np.array([2, 1], np.int32), (ROWS, G))
    verdict = judged(target, tokens, np.eye(V, dtype=np.float32)[tokens], full())
    first, second = target[0][2], target[1][2, 1]
    share = [1 - first, first * (1 - second), first * second]
    assert g_test(np.bincount(verdict.accepted, minlength=3), share) > 1e-3
    assert p_value(verdict, target, rng) > 1e-3


def test_nan_probabilities_are_never_accepted():
    tokens = np.zeros((ROWS, G), np.int32)
    target = conditionals(1)
    verdict = judged(target, tokens, np.full((ROWS, G, V), np.nan, np.float32), full())
    assert not np.any(verdict.accepted)
    assert g_test(np.bincount(np.asarray(verdict.tokens)[:, 0], minlength=V), target[0]) > 1e-3


def mixed_case(rule, temperature, seed=11):
    """Rows with random logits and drafts, most of the drafted tokens the target's own choices."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(ROWS, G + 1, V)), jnp.float32)
    sampling = Sampling.create(ROWS, V, temperature=temperature, rule=rule, seed=seed)
    position = jnp.asarray(rng.integers(1, 50, size=ROWS), jnp.int32)
    t = position[:, None] + jnp.arange(G + 1)[None, :]
    plain = np.asarray(jit_choose(logits, t, sampling))
    return logits, mostly(plain, rng), rng.integers(G + 1, size=ROWS).astype(np.int32), position, sampling, plain


def mostly(choices, rng):
    """Draft the choices [ROWS, G + 1], some of them replaced."""
    return np.where(rng.random((ROWS, G)) < 0.7, choices[:, :G], rng.integers(V, size=(ROWS, G))).astype(np.int32)


def longest_match(tokens, plain, length):
    """The rule for a coupled or greedy draft, in a loop."""
    out = []
    for row, own, n in zip(tokens, plain, length, strict=True):
        matching = 0
        while matching < n and row[matching] == own[matching]:
            matching += 1
        out.append(matching)
    return out


def test_coupled_tokens_are_plain_choices_whatever_the_draft():
    logits, tokens, length, position, sampling, plain = mixed_case("coupled", np.resize([0, 0.6, 1, 2], ROWS))
    verdict = jit_verify(logits, Draft(jnp.asarray(tokens), None, jnp.asarray(length)), position, sampling, 0)
    assert np.array_equal(verdict.tokens, plain)
    assert np.asarray(verdict.accepted).tolist() == longest_match(tokens, plain, length)
    assert verdict.probs is None
    other = jit_verify(logits, Draft(jnp.asarray((tokens + 1) % V), None, jnp.asarray(length)), position, sampling, 1)
    assert np.array_equal(other.tokens, plain)  # neither another draft nor another level is another choice
    assert not np.array_equal(other.accepted, verdict.accepted)


def test_choices_one_by_one_are_those_at_once_up_to_the_first_that_rejects():
    """Rows of a batch reject at different places, and none keeps another from its own end."""
    case = [np.asarray(x) for x in mixed_case("coupled", np.resize([0, 0.8], ROWS))[:4]]
    for batch in (1, 3, 64):
        for first in range(0, 8 * batch, batch):
            logits, tokens, length, position = (jnp.asarray(x[first : first + batch]) for x in case)
            sampling = Sampling.create(batch, V, temperature=np.resize([0, 0.8], batch), seed=3)
            arguments = logits, Draft(tokens, None, length), position, sampling, 0
            whole, apart = (jit_verify_apart(*arguments, one_by_one) for one_by_one in (False, True))
            assert np.array_equal(whole.accepted, apart.accepted)
            reached = np.arange(G + 1)[None, :] <= np.asarray(whole.accepted).max()
            known = np.arange(G + 1)[None, :] <= np.asarray(whole.accepted)[:, None]
            for found, right in ((apart.tokens, whole.tokens), (apart.leads, whole.leads)):
                assert np.array_equal(np.asarray(found)[known], np.asarray(right)[known])
                assert not np.asarray(found)[~np.broadcast_to(reached, known.shape)].any()  # nothing was chosen there


@pytest.mark.parametrize("certain", [True, False])
def test_greedy_under_the_rejection_rule_is_greedy(certain):
    """Rows of temperature 0 among sampled ones accept the matching prefix and continue with the argmax."""
    logits, _, length, position, sampling, _ = mixed_case("rejection", np.resize([0, 1], ROWS))
    best = np.argmax(np.asarray(logits), axis=-1)
    tokens = mostly(best, np.random.default_rng(12))
    one_hot = np.eye(V, dtype=np.float32)[tokens]
    probs = one_hot if certain else 0.5 * one_hot + 0.125
    verdict = jit_verify(logits, Draft(jnp.asarray(tokens), jnp.asarray(probs), jnp.asarray(length)), position, sampling, 0)
    greedy = slice(None, None, 2)
    accepted = np.asarray(verdict.accepted)[greedy]
    assert accepted.tolist() == longest_match(tokens[greedy], best[greedy], length[greedy])
    committed = np.arange(G + 1) <= accepted[:, None]
    assert np.array_equal(np.asarray(verdict.tokens)[greedy][committed], best[greedy][committed])
    assert np.array_equal(verdict.probs[greedy], np.eye(V)[best[greedy]])


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_no_draft_is_plain_sampling(rule):
    p = conditionals(1)[0]
    sampling = Sampling.create(ROWS, V, temperature=1, rule=rule)
    logits = jnp.asarray(np.broadcast_to(np.log(p), (ROWS, 1, V)), jnp.float32)
    verdict = jit_verify(logits, Draft.empty(ROWS, sampling), jnp.full((ROWS,), 3, jnp.int32), sampling, 0)
    assert verdict.tokens.shape == (ROWS, 1)
    assert not np.any(verdict.accepted)
    assert g_test(np.bincount(np.asarray(verdict.tokens)[:, 0], minlength=V), p) > 1e-3


def test_levels_have_noise_of_their_own_under_rejection():
    target = conditionals(1)
    tokens, probs = drafted(conditionals(2), np.random.default_rng(0))
    coins = [np.asarray(judged(target, tokens, probs, full(), level=level).accepted) for level in (0, 1)]
    share = np.bincount(coins[0], minlength=G + 1) / ROWS
    # Alike as distributions, yet far from equal row by row.
    assert g_test(np.bincount(coins[1], minlength=G + 1), share) > 1e-4
    assert np.mean(coins[0] == coins[1]) < 0.95
