"""What passes take: found from the seconds of rounds that draft what they are told, or guessed from bytes."""

import numpy as np
import pytest

import mlspecqd_jax as mlsd
from mlspecqd_jax import pass_measurement
from mlspecqd_jax.generation import compiled, prefilled
from mlspecqd_jax.pass_times import guessed
from mlspecqd_jax.requests import request
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.guide import LOOKUP


@pytest.fixture
def twins(demo):
    return mlsd.stack(demo, demo.quantized(), lengths="auto")


def test_times_are_found_from_the_seconds_of_rounds():
    """Whatever is linear between the knots and never falls comes back as it was, from as few rounds as are tried."""
    rows = np.arange(SLACK + 1)
    truth = np.stack(
        [np.interp(rows, [0, 1, 2, 4, 8, 16], [0, 3, 4, 4.5, 7, 11]), np.interp(rows, [0, 1, 2, 4, 8], [0, 1, 1, 2, 3])]
    )
    passes = np.zeros((9, 2, SLACK + 1))
    for i, (n, inner) in enumerate([(0, 0), (1, 0), (3, 0), (7, 0), (15, 0), (15, 1), (15, 2), (15, 3), (15, 7)]):
        passes[i, 0, n + 1] = 2
        passes[i, 1, inner + 1] = 2 * max(n // (inner + 1), n > 0)
    found = pass_measurement._solved(passes, np.einsum("nlr,lr->n", passes, truth))
    np.testing.assert_allclose(found[:, 1:17][0], truth[0, 1:17], rtol=1e-6)
    np.testing.assert_allclose(found[1, 1:9], truth[1, 1:9], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [[5, 6, 7], list(range(40, 80))])
def test_rounds_are_forced_to_their_lengths(twins, prompt):
    repeated = pass_measurement._repeating(prompt, 8192)
    assert len(repeated) == 2 * pass_measurement.PERIOD
    assert repeated[:3] == prompt[:3]
    assert len(set(repeated)) == pass_measurement.PERIOD
    asked = request(twins, [repeated], {"max_new_tokens": 40, "stop_token_ids": ()})
    state = prefilled(twins, compiled(twins, asked)[0], asked.batch)
    for forced in pass_measurement._forced(twins, 2):
        (target, twin), _ = pass_measurement._rounds(twins, asked, state, forced)
        outer, inner = forced.caps
        assert target.sum() == forced.rounds
        if forced.source == LOOKUP:  # which finds the period, and afterwards what it can
            assert target[outer + 1] >= 1
            assert twin.sum() == 0
        else:
            assert np.flatnonzero(target).tolist() == [outer + 1]
            assert np.flatnonzero(twin).max() == inner + 1


@pytest.mark.slow
def test_what_is_measured_are_times(twins):
    found = pass_measurement.measure(twins, [5, 6, 7], budget=0.0)
    assert found.times.shape == (2, SLACK + 1)
    assert found.times[0, 1] == 1
    assert np.all(np.diff(found.times[:, 1:], axis=1) >= 0)
    assert np.all(found.times[:, 0] == 0)
    assert 0 < found.plain < found.seconds


@pytest.mark.parametrize(("device", "more"), [("cpu", 0.06), ("cpu-xla", 0.3), ("gpu", 0), ("tpu", 0)])
def test_guesses(device, more):
    times = guessed([100, 30, 100], device)
    assert times[0, 1] == times[2, 1] == 1
    assert 0.3 < times[1, 1] < 0.4
    np.testing.assert_allclose(times[:, 16], times[:, 1] * (1 + 15 * more))
    assert np.all(times[:, 17] > times[:, 16])
