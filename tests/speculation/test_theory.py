"""The formulae against closed forms and against coins tossed."""

import numpy as np
import pytest

from mlspecqd_jax.speculation.theory import rounds_for, speedup, tokens_per_round


@pytest.mark.parametrize("a", [0.0, 0.3, 0.9, 0.999])
def test_tokens_per_round_is_the_geometric_sum(a):
    for g in (0, 1, 5, 20):
        assert tokens_per_round(a, g) == pytest.approx((1 - a ** (g + 1)) / (1 - a))
    assert tokens_per_round(1.0, 7) == 8


def tossed(n, a, g, rng):
    """Count the rounds until n tokens are there."""
    rounds = 0
    while n > 0:
        accepted = next((k for k in range(g) if rng.random() >= a), g)
        n -= accepted + 1
        rounds += 1
    return rounds


@pytest.mark.parametrize(("n", "a", "g"), [(6, 0.7, 3), (8, 0.9, 7), (5, 0.4, 1), (4, 0.5, 0)])
def test_rounds_for_a_draft(n, a, g):
    rng = np.random.default_rng(n)
    samples = [tossed(n, a, g, rng) for _ in range(20_000)]
    bound = 4 * np.std(samples) / np.sqrt(len(samples))
    assert rounds_for(n, a, g) == pytest.approx(np.mean(samples), abs=bound + 1e-9)
    assert rounds_for(0, a, g) == 0
    assert rounds_for(n, 1.0, g) == -(-n // (g + 1))
    assert rounds_for(n, 0.0, g) == n


def test_speedup_of_the_papers_setting():
    """One level: MXFP4 throughout reads 0.266 of the bytes. Two: a free draft of acceptance 0.5 under it."""
    assert speedup(0.9, 5, 5 * 0.266) == pytest.approx(2.01, abs=0.005)
    nested = tokens_per_round(0.9, 8) / (1 + 8 * 0.02 + rounds_for(8, 0.5, 4) * 0.266 * (1 + 4 * 0.02))
    assert nested == pytest.approx(2.48, abs=0.02)
    assert speedup(0.9, 8, rounds_for(8, 0.5, 4) * 0.266 * (1 + 4 * 0.02), 0.02) == pytest.approx(nested)
