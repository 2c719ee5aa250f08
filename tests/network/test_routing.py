"""`network.routing`: each rule against its definition in float64, its ties, and a position's bits whatever the others are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlspecqd_jax.network.config import Router
from mlspecqd_jax.network.routing import route

E, C, T = 12, 3, 33
RULES = {
    "softmax": Router(E, C, "softmax"),
    "softmax, normed": Router(E, C, "softmax", normed=True),
    "softmax, normed by a least sum": Router(E, C, "softmax", choice_bias=True, normed=True, least_sum=0.5),
    "softmax of chosen": Router(E, C, "softmax of chosen"),
    "sigmoid of chosen": Router(E, 1, "sigmoid of chosen"),
    "sigmoid": Router(E, C, "sigmoid", choice_bias=True, normed=True),
    "groups": Router(E, C, "sigmoid", choice_bias=True, groups=4, groups_chosen=2, normed=True, factor=1.7),
    "groups of one": Router(E, C, "softmax", groups=12, groups_chosen=4, factor=0.5),
}
rules = pytest.mark.parametrize("rule", RULES)


def logits(seed=0, rows=T):
    return jnp.asarray(2 * np.random.RandomState(seed).standard_normal((rows, E)), jnp.float32)


def bias_of(router):
    return jnp.asarray(np.random.RandomState(1).standard_normal(E), jnp.float32) if router.choice_bias else None


def expected(row, bias, router):
    """One position's experts and factors, by the definition."""
    exp = np.exp(row - row.max())
    scores = {"softmax": exp / exp.sum(), "sigmoid": 1 / (1 + np.exp(-row))}.get(router.scores, row)
    wanted = scores if bias is None else scores + bias
    groups = wanted.reshape(router.groups, -1)
    best = sorted(range(router.groups), key=lambda g: -np.sort(groups[g])[-2:].sum())[: router.groups_chosen]
    allowed = [e for e in range(E) if e // groups.shape[1] in best]
    chosen = sorted(allowed, key=lambda e: -wanted[e])[: router.chosen]
    factors = scores[chosen]
    if router.scores == "softmax of chosen":
        factors = np.exp(factors - factors.max()) / np.exp(factors - factors.max()).sum()
    if router.scores == "sigmoid of chosen":
        factors = 1 / (1 + np.exp(-factors))
    if router.normed:
        factors = factors / max(factors.sum(), router.least_sum)
    return chosen, factors * router.factor


@rules
def test_the_rule_is_its_definition(rule):
    router = RULES[rule]
    bias = bias_of(router)
    experts, factors = jax.jit(route, static_argnums=2)(logits(), bias, router)
    assert (experts.dtype, factors.dtype) == (jnp.int32, jnp.float32)
    for t, row in enumerate(np.asarray(logits(), np.float64)):
        chosen, by = expected(row, None if bias is None else np.asarray(bias, np.float64), router)
        assert experts[t].tolist() == chosen
        np.testing.assert_allclose(factors[t], by, rtol=2e-6)


@rules
def test_a_position_s_bits_do_not_depend_on_the_others(rule):
    router = RULES[rule]
    run = jax.jit(route, static_argnums=2)
    whole = run(logits(), bias_of(router), router)
    for begin, rows in ((0, 1), (5, 1), (3, 2), (16, 17)):
        for part, all_rows in zip(run(logits()[begin : begin + rows], bias_of(router), router), whole, strict=True):
            np.testing.assert_array_equal(part, all_rows[begin : begin + rows])


@rules
def test_of_equal_scores_the_lower_number_goes_first(rule):
    router = dataclasses.replace(RULES[rule], choice_bias=False)
    experts, factors = route(jnp.zeros((2, E)), None, router)
    assert experts.tolist() == [[0, 1, 2][: router.chosen]] * 2
    assert (factors == factors[0, 0]).all()
