"""The assignment of formats under a budget of bits, against every assignment there is."""

import itertools

import numpy as np
import pytest

from mlspecqd_jax.weights.precision import assign


def total(chosen, table):
    return sum(table[name][format] for name, format in chosen.items())


@pytest.mark.parametrize("seed", range(20))
def test_it_is_near_the_best_of_all_assignments(seed):
    """Within the budget, and at most what one more step would gain from the best."""
    r = np.random.RandomState(seed)
    names, formats = [f"w{i}" for i in range(6)], ["a", "b", "c"]
    sizes = {name: float(r.randint(1, 20)) for name in names}
    bits = {name: {f: b * sizes[name] for f, b in zip(formats, (4.25, 5, 8), strict=True)} for name in names}
    costs = {name: dict(zip(formats, np.sort(r.rand(3) ** 3 * sizes[name])[::-1].tolist(), strict=True)) for name in names}
    budget = 5.2 * sum(sizes.values())
    chosen = assign(costs, bits, budget)
    assert total(chosen, bits) <= budget
    every = [dict(zip(names, pick, strict=True)) for pick in itertools.product(formats, repeat=len(names))]
    best = min(total(each, costs) for each in every if total(each, bits) <= budget)
    uniform = min(total(dict.fromkeys(names, f), costs) for f in formats if total(dict.fromkeys(names, f), bits) <= budget)
    assert best <= total(chosen, costs) <= min(1.35 * best + 1e-9, uniform)


def test_a_budget_is_spent_where_it_gains_most():
    bits = {"one": {"small": 4.0, "large": 8.0}, "two": {"small": 4.0, "large": 8.0}}
    costs = {"one": {"small": 1.0, "large": 0.0}, "two": {"small": 3.0, "large": 0.0}}
    assert assign(costs, bits, 12) == {"one": "small", "two": "large"}
    assert assign(costs, bits, 16) == {"one": "large", "two": "large"}
    assert assign(costs, bits, 8) == {"one": "small", "two": "small"}


def test_more_bits_that_gain_nothing_are_not_taken():
    bits, costs = {"w": {"small": 4.0, "large": 8.0}}, {"w": {"small": 0.5, "large": 0.6}}
    assert assign(costs, bits, 100) == {"w": "small"}


def test_a_budget_that_nothing_meets_is_refused():
    with pytest.raises(ValueError, match="the budget of 3 bits is less than the 4 of the smallest formats"):
        assign({"w": {"small": 1.0}}, {"w": {"small": 4.0}}, 3)
