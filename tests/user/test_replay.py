"""What is played on a target's text: which of its tokens a twin would have chosen, and what that is worth."""

import dataclasses
import functools

import family_files
import numpy as np
import pytest

import mlspecqd_jax as mlsd
from mlspecqd_jax import replay
from mlspecqd_jax.speculation.buffers import SLACK

pytestmark = pytest.mark.usefixtures("compiled_quickly")
TOKENS = 40  # so that the last window is not whole


def agreement(model, written):
    found = replay.read(model, [written])
    assert 0 < found.seconds < 1
    [agreement] = found.agreements
    return agreement


@pytest.fixture(scope="module")
def written(demo):
    plain, prompt = mlsd.stack(demo), demo.tokenizer.encode("def read_file(path):")
    return functools.cache(lambda temperature: replay.write(plain, prompt, TOKENS, temperature=temperature, seed=5))


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.8])
def test_the_target_would_have_written_its_own_text(demo, written, temperature):
    assert agreement(demo, written(temperature)).tolist() == [True] * TOKENS
    assert agreement(demo.quantized("int4"), written(temperature)).mean() > 0.8
    wrong = dataclasses.replace(demo, params=demo.params | {"model.norm.weight": -demo.params["model.norm.weight"]})
    assert agreement(wrong, written(temperature)).mean() < 0.2


def test_the_text_is_what_generating_gives(demo, written):
    out = mlsd.generate(mlsd.stack(demo), "def read_file(path):", max_new_tokens=TOKENS, temperature=0.8, seed=5, stop_token_ids=())
    state = written(0.8).state
    assert np.asarray(state.tokens)[0, int(state.begin[0]) : int(state.length[0])].tolist() == out.tokens[0]


def test_other_noise_would_have_written_another_text(demo, written):
    state, sampling, _ = written(0.8)
    other = written(0.8)._replace(sampling=sampling.__class__(**(vars(sampling) | {"seed": sampling.seed + 1})))
    assert agreement(demo, other).mean() < 0.9
    assert agreement(demo, replay.Written(state, sampling)).all()


@pytest.mark.exhaustive
def test_a_state_is_fed_up_to_each_place(tmp_path):
    """A cache that does not hold all positions, of a model that would have written all of its own text."""
    model = mlsd.load(family_files.write(tmp_path, "qwen3_5"), dtype="float32")
    text = replay.write(mlsd.stack(model), [3, 1, 4, 1, 5] * 5, TOKENS, temperature=0.8, seed=5)
    assert agreement(model, text).tolist() == [True] * TOKENS
    assert 0.2 < agreement(model.quantized("mxfp8_e4m3"), text).mean() < 1


def played(hits, length, target, draft):
    """The time of `length`, round by round and token by token."""
    place, time = 0, 0.0
    while place < len(hits):
        drafted = min(length, len(hits) - place - 1)
        accepted = 0
        while accepted < drafted and hits[place + accepted]:
            accepted += 1
        time += target[drafted + 1] + drafted * draft
        place += accepted + 1
    return time


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 1.0])
def test_the_best_length_is_found(rate):
    rng = np.random.default_rng(3)
    rows = np.arange(SLACK + 1)
    target, draft = (1 + 0.05 * (rows - 1)) * (rows > 0), 0.3
    texts = [rng.random(n) < rate for n in (64, 33, 1)]
    speeds = [98 / sum(played(hits, length, target, draft) for hits in texts) for length in range(16)]
    np.testing.assert_allclose(replay.best_fixed(texts, target, draft), max(speeds), rtol=1e-12)
    assert (np.argmax(speeds) == 0) == (rate < 0.5)
