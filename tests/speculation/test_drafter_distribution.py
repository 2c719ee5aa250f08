"""Rejection with drafters that are no levels of the target's tokens keeps the joint distribution of plain decoding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frequencies import count_sequences, g_test
from oracles import filtered_oracle, softmax
from other_tokens import dictionary_of, translated
from toys import Toy, ToyDrafter, level, quick_jit, ragged

from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.loop import generate_tokens
from mlspecqd_jax.speculation.settings import Sampling


def joint_case(batch, seed=0):
    """A model of three tokens in context two, four new tokens: (stacks by name, run arguments, exact joint distribution)."""
    small = Toy(4, order=2)
    target, draft = small.table(10, scale=1.0), small.table(11, scale=1.0)
    prompt = [1, 0]
    probs = {(): 1.0}
    for _ in range(4):
        longer = {}
        for so_far, p in probs.items():
            given = softmax(filtered_oracle(small.truth(target, prompt + list(so_far)), 0.8)[0])
            longer |= {(*so_far, x): p * given[x] for x in range(4)}
        probs = longer
    expected = np.array([probs[key] for key in itertools.product(range(4), repeat=4)])
    # Of other tokens, one of which is never meant: its draft's distribution is over three of the four.
    other = Toy(6, order=2)
    foreign = translated(other, other.table(12, scale=1.0), dictionary_of([(1,), (2, 3), (4,), (0,)], opening=(2,)), 4, stretch=2.0)
    stacks = {
        "plain": level(small, target),
        "drafted": level(small, target, ToyDrafter(draft, small), 2),
        "translated": level(small, target, foreign, 2),
    }
    tokens = jnp.broadcast_to(ragged([prompt], SLACK + 8)[0], (batch, SLACK + 8))
    sampling = Sampling.create(batch, 4, temperature=0.8, rule="rejection", seed=seed)
    return stacks, (tokens, jnp.full((batch,), 2, jnp.int32), jnp.full((batch,), 6, jnp.int32), sampling), expected


def joint_counts(stack, arguments):
    compiled = quick_jit(generate_tokens) if len(arguments[1]) < 10**5 else jax.jit(generate_tokens)
    tokens, length, state = compiled(stack, *arguments)
    assert np.all(length == 6)
    return count_sequences(np.asarray(tokens)[:, 2:6], 4), state


def check_joint(batch, seed, name="drafted"):
    stacks, arguments, expected = joint_case(batch, seed)
    counts, state = joint_counts(stacks[name], arguments)
    assert g_test(counts, expected) > 1e-3
    off = expected**1.05
    assert g_test(counts, off / off.sum()) < 1e-3  # the test sees a little more certainty
    judged, accepted = (np.asarray(found).sum(axis=0) for found in (state.counts.judged, state.counts.accepted))
    assert np.all(judged > 0.05 * batch)
    assert np.all(0.1 * judged < accepted)
    assert np.all(accepted < 0.95 * judged)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drafted", "translated"])
def test_rejection_keeps_the_joint_distribution_of_plain_decoding(name):
    check_joint(30_000, 0, name)


@pytest.mark.exhaustive
def test_rejection_keeps_the_joint_distribution_at_length():
    for seed in (10**6, 2 * 10**6):
        check_joint(300_000, seed)


@pytest.mark.slow
def test_plain_decoding_has_the_joint_distribution():
    stacks, arguments, expected = joint_case(300_000)
    assert g_test(joint_counts(stacks["plain"], arguments)[0], expected) > 1e-3
