"""`assign`: a format for each weight, so that a model's text changes least under a budget of bits."""

from collections.abc import Mapping

from mlspecqd_jax.errors import InputError

HALVINGS = 60  # of the price of a bit


def assign(costs: Mapping[str, Mapping[str, float]], bits: Mapping[str, Mapping[str, float]], budget: float) -> dict[str, str]:
    """Return the format of each weight: of least cost in all, with at most so many bits in all.

    Costs add up. For a price of a bit, each weight takes the format of least cost and price together; the least price that meets
    the budget is found by halving, and what the budget leaves is spent on the changes that gain most for each bit (a knapsack's
    Lagrangian relaxation, then a greedy end).

    Args:
      costs: by weight, then format.
      bits: likewise, of the whole weight.
      budget: bits in all.

    Raises:
      InputError: not even the least bits meet the budget.
    """
    least = sum(min(each.values()) for each in bits.values())
    if least > budget:
        raise InputError(f"the budget of {budget:.0f} bits is less than the {least:.0f} of the smallest formats; give more bits")

    def at(price):
        return {name: min(each, key=lambda f: (each[f] + price * bits[name][f], bits[name][f])) for name, each in costs.items()}

    def total(chosen):
        return sum(bits[name][format] for name, format in chosen.items())

    low, high = 0.0, 1e-30
    while total(at(high)) > budget:
        high *= 16
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if total(at(middle)) <= budget else (middle, high)
    chosen = at(high)
    return _spend(chosen, costs, bits, budget - total(chosen))


def _spend(chosen, costs, bits, left):
    """Change one format after another for a better one, the most gain a bit first, while the bits left allow."""
    while True:
        steps = [
            ((costs[name][now] - costs[name][to]) / max(bits[name][to] - bits[name][now], 1e-9), name, to)
            for name, now in chosen.items()
            for to in costs[name]
            if costs[name][to] < costs[name][now] and bits[name][to] - bits[name][now] <= left
        ]
        if not steps:
            return chosen
        _, name, to = max(steps)
        left -= bits[name][to] - bits[name][chosen[name]]
        chosen = chosen | {name: to}
