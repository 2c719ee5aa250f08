"""Filters and penalties (C4, C6) against sorting, loops and transformers."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import adjust_oracle, filtered_oracle, softmax
from toys import jit_choose, quick_jit

from mlspecqd_jax.speculation import choosing as module
from mlspecqd_jax.speculation.choosing import DRAW, adjust, draw, filtered, noise, probabilities
from mlspecqd_jax.speculation.settings import Sampling

# One row each: temperature, top_k, top_p, min_p.
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (2.5, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.7, 3, 1.0, 0.0),
    (1.0, 5000, 1.0, 0.0),
    (1.0, 0, 0.9137, 0.0),
    (1.3, 0, 0.3517, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 0.99937, 0.0),
    (1.0, 0, 1.0, 0.05),
    (0.6, 0, 1.0, 1.0),
    (0.8, 20, 0.7061, 0.02),
    (1.7, 4, 0.8303, 0.3),
]

KINDS = ("plain", "ties", "banned", "equal")
BATCH, WINDOW = len(SETTINGS), 8  # most tests share these shapes, so that little is compiled

jit_filtered = quick_jit(filtered)
jit_probabilities = quick_jit(probabilities)
jit_adjust = quick_jit(adjust)


def filter_rows(logits, **settings):
    """Filter a few rows [n, V] of logits, one setting each, in the shared shape."""
    n, vocab = np.shape(logits)
    padded = np.zeros((BATCH, WINDOW, vocab), np.float32)
    padded[:n, 0] = logits
    padded_settings = {name: np.resize(value, BATCH) for name, value in settings.items()}
    return np.asarray(jit_filtered(padded, Sampling.create(BATCH, vocab, **padded_settings)))[:n, 0]


def create(batch, vocab, settings):
    temperature, top_k, top_p, min_p = zip(*settings, strict=True)
    return Sampling.create(batch, vocab, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def logits_of_kind(kind, vocab, batch, window, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, window, vocab)) * 3
    if kind == "ties":
        x = np.round(x)  # whole numbers, so that most thresholds fall on a tie
        x = np.where((x == 0) & (rng.random(x.shape) < 0.5), -0.0, x)
    if kind == "banned":
        x = np.where(rng.random(x.shape) < 0.4, -np.inf, x)
        x[..., rng.integers(vocab)] = 1.0  # at least one is left
    if kind == "equal":
        x = np.zeros_like(x)
        x[..., ::2] = -0.0
    return x.astype(np.float32)


@pytest.mark.parametrize("vocab", [1, 2, 7, 97, 1000])
def test_filters_equal_sorting(vocab):
    """All rows carry settings of their own, so a row that leaks into another shows."""
    logits = np.concatenate([logits_of_kind(kind, vocab, BATCH, 2) for kind in KINDS], axis=1)
    ours = np.asarray(jit_filtered(logits, create(BATCH, vocab, SETTINGS)))
    doubtful = 0
    for row, w in np.ndindex(BATCH, WINDOW):
        truth, rounding_decides = filtered_oracle(logits[row, w], *SETTINGS[row])
        doubtful += rounding_decides
        if not rounding_decides:
            np.testing.assert_allclose(ours[row, w], truth, rtol=1e-6, err_msg=f"{KINDS[w // 2]} {SETTINGS[row]}")
    assert doubtful < 0.1 * BATCH * WINDOW


def test_probabilities_are_the_softmax_of_the_filtered_or_one_hot():
    logits = np.concatenate([logits_of_kind(kind, 7, BATCH, 2) for kind in KINDS], axis=1)
    settings = [(0.0, *setting[1:]) if r % 3 == 0 else setting for r, setting in enumerate(SETTINGS)]
    ours = np.asarray(jit_probabilities(logits, create(BATCH, 7, settings)))
    kept = np.asarray(jit_filtered(logits, create(BATCH, 7, settings)))
    for row, w in np.ndindex(BATCH, WINDOW):
        truth = np.eye(7)[np.argmax(logits[row, w])] if row % 3 == 0 else softmax(kept[row, w])
        np.testing.assert_allclose(ours[row, w], truth, atol=1e-6)


def test_top_p_drops_ties_of_lower_index_first():
    logits = np.log([[2, 1, 1, 2, 1, 1, 0.001]] * 4)
    kept = np.isfinite(filter_rows(logits, temperature=[1], top_p=[0.8, 0.6, 0.4, 0.2] * 4)[:, :6]).astype(int)
    assert kept.tolist() == [[1, 0, 1, 1, 1, 1], [1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]


def test_negative_zero_ties_with_zero_under_jit():
    """XLA must not fold away what makes the two equal."""
    logits = [[-1.0, 0.0, -0.0, -2.0, -3, -3, -3], [-1.0, -0.0, 0.0, -2.0, -3, -3, -3]]
    kept = np.isfinite(filter_rows(logits, temperature=[1], top_k=[1])).astype(int)
    assert kept.tolist() == [[0, 1, 1, 0, 0, 0, 0]] * 2


def test_the_largest_is_argmax_and_its_lead_a_sort():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(40, 37)).astype(np.float32)
    x[1, [3, 30]] = x[1].max() + 1  # a tie
    x[2, [5, 6]] = [-0.0, 0.0]
    x[2, 7:], x[2, :5] = -1, -1
    x[3, [20, 33]] = np.nan
    x[4] = np.nan
    x[5, [9, 11]] = np.inf
    x[6] = -np.inf
    x[7, 4:] = -np.inf
    x[8, :] = -np.inf
    x[8, 36] = 2
    found = quick_jit(module.largest)(x)
    assert found.dtype == jnp.int32
    assert found.tolist() == np.argmax(x, axis=-1).tolist() == jnp.argmax(x, axis=-1).tolist()
    sound = np.isfinite(x).any(axis=-1) & ~np.isnan(x).any(axis=-1) & (x < np.inf).all(axis=-1)
    last = np.sort(x[sound], axis=-1)
    assert np.array_equal(quick_jit(module.lead)(x)[sound], last[:, -1] - last[:, -2])
    assert module.lead(x)[8] == np.inf
    assert module.lead(x)[1] == 0


def test_greedy_rows_among_sampled_ones_take_the_first_argmax():
    logits = logits_of_kind("ties", 97, BATCH, WINDOW)
    chosen = jit_choose(logits, np.arange(WINDOW), 0, DRAW, Sampling.create(BATCH, 97, temperature=[0, 1] * 7, top_k=3))
    first = np.argmax(logits, axis=-1)  # numpy's is the first of equals
    assert np.array_equal(chosen[::2], first[::2])
    assert np.any(chosen[1::2] != first[1::2], axis=-1).all()


def test_a_greedy_batch_skips_noise_and_filters(monkeypatch):
    logits = logits_of_kind("ties", 7, 3, 4)
    sampling = Sampling.create(3, 7, top_k=2, top_p=0.5, min_p=0.1)

    # What the skipped branch would compute poisons all that it touches.
    monkeypatch.setattr(module, "filtered", lambda x, s: x * jnp.nan)

    @quick_jit
    def poisoned(sampling):
        keys = noise(sampling.seed, jnp.zeros((3, 4), jnp.int32), 0, DRAW)
        return draw(logits, keys, sampling), probabilities(logits, sampling)

    first = np.argmax(logits, axis=-1)
    chosen, probs = poisoned(sampling)
    assert np.array_equal(chosen, first)
    assert np.array_equal(probs, np.eye(7)[first])
    assert np.isnan(poisoned(dataclasses.replace(sampling, temperature=jnp.full((3,), 0.5)))[1]).all()  # the poison works


def test_adjust_equals_a_loop():
    """Tokens at or beyond a position never count: all windows share one buffer with the drafted tokens in place."""
    batch, window, vocab, size = 5, 4, 11, 24
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(batch, window, vocab)).astype(np.float32) * 2
    tokens = rng.integers(vocab, size=(batch, size)).astype(np.int32)
    prompt = np.array([1, 3, 6, 9, 2], np.int32)
    position = (prompt + np.array([0, 1, 4, 9, 15]))[:, None] + np.arange(window)
    bias = [{}, {3: 2.5}, {0: -math.inf, 4: -1}, {10: 0.5}, {7: 100, 8: -100}]
    values = {
        "repetition_penalty": [1.0, 1.3, 0.7, 2.0, 1.0],
        "presence_penalty": [0.0, 0.5, -0.4, 0.0, 1.5],
        "frequency_penalty": [0.0, 0.2, 0.0, -0.3, 0.7],
    }
    sampling = Sampling.create(batch, vocab, logit_bias=bias, **values)
    sampling = dataclasses.replace(sampling, prompt_length=jnp.asarray(prompt))
    ours = jit_adjust(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(position), sampling)
    for r, w in np.ndindex(batch, window):
        penalties = [value[r] for value in values.values()]
        truth = adjust_oracle(logits[r, w], tokens[r, : position[r, w]].tolist(), prompt[r], *penalties, bias[r])
        np.testing.assert_allclose(ours[r, w], truth, rtol=1e-5, atol=1e-5)

    # The same with other tokens at and beyond each row's first position: the first position must not notice, later ones must.
    later = np.where(np.arange(size) >= position[:, :1], (tokens + 1) % vocab, tokens)
    other = jit_adjust(jnp.asarray(logits), jnp.asarray(later), jnp.asarray(position), sampling)
    assert np.array_equal(other[:, 0], ours[:, 0])
    assert not np.array_equal(other[1:, 1:], ours[1:, 1:])


def test_adjust_without_wishes_changes_nothing():
    logits = logits_of_kind("banned", 7, 2, 3)
    tokens, position = jnp.zeros((2, 9), jnp.int32), jnp.full((2, 3), 5)
    assert np.array_equal(jit_adjust(logits, tokens, position, Sampling.create(2, 7)), logits)
    biased = jit_adjust(logits, tokens, position, Sampling.create(2, 7, logit_bias={3: 1}))
    assert np.array_equal(biased, logits + np.eye(7, dtype=np.float32)[3])


def test_a_row_draws_what_it_draws_alone():
    temperature, top_p = np.linspace(0, 2, BATCH), np.linspace(0.3, 1, BATCH)
    logits, t = logits_of_kind("plain", 97, BATCH, WINDOW), np.arange(5, 5 + WINDOW)
    together = jit_choose(logits, t, 0, DRAW, Sampling.create(BATCH, 97, temperature=temperature, top_p=top_p, seed=40))
    for r in range(BATCH):
        alone = Sampling.create(1, 97, temperature=temperature[r], top_p=top_p[r], seed=40 + r)
        assert np.array_equal(jit_choose(logits[r : r + 1], t, 0, DRAW, alone)[0], together[r])


@pytest.mark.torch
def test_equal_to_the_processors_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    rng, compared = np.random.default_rng(3), 0
    for vocab in (2, 7, 97, 1000):
        length = 12
        tokens = rng.integers(vocab, size=(BATCH, length)).astype(np.int32)
        bias = [{int(v): float(rng.normal()) for v in rng.integers(vocab, size=2)} for _ in SETTINGS]
        for r in range(0, BATCH, 3):
            bias[r][0] = -math.inf
        penalty = rng.uniform(0.6, 1.8, size=BATCH).astype(np.float32)
        sampling = dataclasses.replace(
            create(BATCH, vocab, SETTINGS),
            repetition_penalty=jnp.asarray(penalty),
            logit_bias=Sampling.create(BATCH, vocab, logit_bias=bias).logit_bias,
        )
        for kind in KINDS:
            logits = logits_of_kind(kind, vocab, BATCH, 1, seed=vocab)
            position = jnp.full((BATCH, 1), length)
            adjusted = jit_adjust(jnp.asarray(logits), jnp.asarray(tokens), position, sampling)
            ours = np.asarray(jit_filtered(adjusted, sampling))[:, 0]
            for r, (temperature, top_k, top_p, min_p) in enumerate(SETTINGS):
                processors = [
                    hf.SequenceBiasLogitsProcessor({(v,): b for v, b in bias[r].items()}),
                    hf.RepetitionPenaltyLogitsProcessor(float(penalty[r])),
                    hf.TemperatureLogitsWarper(temperature),
                    *([hf.TopKLogitsWarper(top_k)] if top_k else []),
                    *([hf.TopPLogitsWarper(top_p)] if top_p < 1 else []),
                    *([hf.MinPLogitsWarper(min_p)] if min_p else []),
                ]
                theirs = torch.from_numpy(logits[r])
                for process in processors:
                    theirs = process(torch.from_numpy(tokens[r : r + 1]).long(), theirs)
                if filtered_oracle(np.asarray(adjusted)[r, 0], *SETTINGS[r])[1]:
                    continue  # rounding decides
                # torch's sort is not stable, so which of equal logits top_p drops is its own affair.
                view = np.sort if kind in ("ties", "equal") and top_p < 1 else np.asarray
                np.testing.assert_allclose(
                    view(ours[r]), view(theirs[0].numpy()), rtol=1e-5, atol=1e-6, err_msg=f"{vocab} {kind} {r}"
                )
                compared += 1
    assert compared > 0.8 * 4 * len(KINDS) * BATCH
