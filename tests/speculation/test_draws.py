"""Draws and coins: the distribution they promise, and what their noise depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frequencies import count_sequences, g_test
from oracles import filtered_oracle, softmax
from toys import jit_choose, quick_jit

from mlspecqd_jax.speculation.choosing import COIN, DRAW, RESIDUAL, noise, uniform
from mlspecqd_jax.speculation.settings import Sampling

DRAWS = 50_000  # rows, of two positions each
LOGITS = np.asarray([0.3, -1.0, 1.2, 0.9, -0.2, 1.2], np.float32)
CASES = [(1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.4, 3, 1.0, 0.0), (1.0, 0, 0.7, 0.0), (2.0, 0, 1.0, 0.6), (0.9, 5, 0.8, 0.3)]


def draw_pairs(purpose, level=0, seed=0, case=CASES[0]):
    """Draw for two positions once a row, with seeds counted from `seed`: int32 [DRAWS, 2]."""
    temperature, top_k, top_p, min_p = case
    sampling = Sampling.create(DRAWS, 6, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    return np.asarray(jit_choose(LOGITS[None, None], np.arange(2), level, purpose, sampling))


@pytest.mark.parametrize("purpose", [DRAW, RESIDUAL])
def test_choices_follow_the_filtered_softmax(purpose):
    for case in CASES:
        drawn = draw_pairs(purpose, case=case)
        p = softmax(filtered_oracle(LOGITS, *case)[0])
        assert g_test(count_sequences(drawn, 6), np.outer(p, p)) > 1e-3 / (2 * len(CASES))
        # The test must see a temperature that is off.
        off = p**1.3 / np.sum(p**1.3)
        assert g_test(count_sequences(drawn, 6), np.outer(off, off)) < 1e-6


def test_draws_are_independent_between_purposes_levels_and_seeds():
    first = draw_pairs(DRAW)[:, 0]
    others = [draw_pairs(RESIDUAL)[:, 0], draw_pairs(DRAW, level=1)[:, 0], draw_pairs(DRAW, seed=1)[:, 0]]
    p = softmax(LOGITS)
    for other in others:
        assert g_test(count_sequences(np.stack([first, other], axis=1), 6), np.outer(p, p)) > 1e-3 / len(others)
    assert g_test(count_sequences(np.stack([first, first], axis=1), 6), np.outer(p, p)) < 1e-6


def test_coins_are_uniform_and_independent_of_draws():
    @quick_jit
    def flip(seeds):
        return uniform(noise(seeds, jnp.zeros((DRAWS, 1), jnp.int32), 0, COIN))[:, 0]

    coins = np.asarray(flip(jnp.arange(DRAWS, dtype=jnp.uint32)))
    assert coins.min() >= 0
    assert coins.max() < 1
    p = softmax(LOGITS)
    tenth = np.full(10, 0.1)
    joint = np.bincount(draw_pairs(DRAW)[:, 0] * 10 + (coins * 10).astype(int), minlength=60)
    assert g_test(joint, np.outer(p, tenth)) > 1e-3
    bent = np.bincount((coins**1.03 * 10).astype(int), minlength=10)
    assert g_test(bent, tenth) < 1e-6


def test_noise_is_a_function_of_seed_position_level_and_purpose():
    seeds = jnp.asarray([0, 1, 7, 2**31, 2**32 - 1], jnp.uint32)
    t = jnp.broadcast_to(jnp.asarray([0, 1, 2, 300, 10**6]), (5, 5))

    @quick_jit
    def keys(seeds, t):
        return jnp.stack([jax.random.key_data(noise(seeds, t, level, purpose)) for level in range(3) for purpose in range(3)])

    data = np.asarray(keys(seeds, t))  # [9, 5, 5, 2]
    assert len(np.unique(data.reshape(-1, 2), axis=0)) == 225
    moved = np.asarray(keys(seeds[::-1], t[:, ::-1]))
    assert np.array_equal(moved[:, ::-1, ::-1], data)  # the place in the batch and the window is no input
