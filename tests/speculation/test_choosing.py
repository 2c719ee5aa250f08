"""Sampling (C4, C6) against sorting, loops, transformers, and the distribution it promises."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import adjust_oracle, count_sequences, filtered_oracle, g_test, quick_jit, softmax

from mlspecqd_jax.speculation import choosing as module
from mlspecqd_jax.speculation.choosing import COIN, DRAW, RESIDUAL, adjust, draw, filtered, noise, probabilities, uniform
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


@quick_jit
def jit_choose(logits, t, level, purpose, sampling):
    """Choose from logits [B or 1, W, V] at the indices t [W]; level and purpose are traced, for a single compilation."""
    t = jnp.broadcast_to(t, (len(sampling.seed), len(t)))
    return draw(jnp.broadcast_to(logits, (*t.shape, logits.shape[-1])), noise(sampling.seed, t, level, purpose), sampling)


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


def test_one_bias_mapping_is_for_all_rows():
    shared = Sampling.create(2, 5, logit_bias={1: 2.0, 3: -math.inf}).logit_bias
    assert np.array_equal(shared, [[0, 2, 0, -math.inf, 0]] * 2)
    apart = Sampling.create(2, 5, logit_bias=[{1: 2.0}, {}]).logit_bias
    assert np.array_equal(apart, [[0, 2, 0, 0, 0], [0] * 5])


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


def test_a_row_draws_what_it_draws_alone():
    temperature, top_p = np.linspace(0, 2, BATCH), np.linspace(0.3, 1, BATCH)
    logits, t = logits_of_kind("plain", 97, BATCH, WINDOW), np.arange(5, 5 + WINDOW)
    together = jit_choose(logits, t, 0, DRAW, Sampling.create(BATCH, 97, temperature=temperature, top_p=top_p, seed=40))
    for r in range(BATCH):
        alone = Sampling.create(1, 97, temperature=temperature[r], top_p=top_p[r], seed=40 + r)
        assert np.array_equal(jit_choose(logits[r : r + 1], t, 0, DRAW, alone)[0], together[r])


def test_create_broadcasts_and_numbers_seeds():
    sampling = Sampling.create(3, 50, temperature=0.5, top_k=[1, 2, 3], seed=7, stop_token_ids=[4, 5])
    assert sampling.temperature.tolist() == [0.5] * 3
    assert sampling.top_k.tolist() == [1, 2, 3]
    assert sampling.seed.tolist() == [7, 8, 9]
    assert sampling.stop_token_ids.tolist() == [4, 5] + [-1] * 6
    assert sampling.logit_bias is None
    assert Sampling.create(2, 50, seed=[5, 5]).seed.tolist() == [5, 5]
    assert Sampling.create(2, 50, seed=2**32 - 2).seed.tolist() == [2**32 - 2, 2**32 - 1]
    assert [len(Sampling.create(1, 50, stop_token_ids=range(n)).stop_token_ids) for n in (0, 1, 8, 9)] == [8, 8, 8, 16]
    assert Sampling.create(1, 50, stop_token_ids=np.arange(8)).stop_token_ids.tolist() == list(range(8))
    assert Sampling.create(1, 50, logit_bias={np.int64(3): np.float32(2)}).logit_bias[0, 3] == 2
    assert Sampling.create(1, 50, top_k=2**40).top_k[0] >= 50  # more than there are tokens, not what is left of the bits


BAD = [
    ("temperature", -0.1, "0 (greedy) or more"),
    ("temperature", math.nan, "0 (greedy) or more"),
    ("temperature", math.inf, "0 (greedy) or more"),
    ("temperature", 1e39, "0 (greedy) or more"),  # inf in float32
    ("temperature", "hot", "0 (greedy) or more"),
    ("temperature", None, "0 (greedy) or more"),
    ("temperature", True, "0 (greedy) or more"),
    ("temperature", 1j, "0 (greedy) or more"),
    ("temperature", {1.0}, "0 (greedy) or more"),
    ("top_k", "3", "0 (off) or a positive whole number"),
    ("logit_bias", dict.fromkeys(range(9), -math.inf), "bans every token of row 0; leave at least one"),
    ("temperature", [1.0, 1.0], "one for each of 3 rows"),
    ("temperature", [[1.0, 1.0, 1.0]], "one for each of 3 rows"),
    ("temperature", [1.0, -1.0, 1.0], "0 (greedy) or more"),
    ("top_k", -1, "0 (off) or a positive whole number"),
    ("top_k", 2.5, "0 (off) or a positive whole number"),
    ("top_k", math.nan, "0 (off) or a positive whole number"),
    ("top_p", 0.0, "more than 0 and at most 1"),
    ("top_p", 1.1, "more than 0 and at most 1"),
    ("min_p", -0.1, "between 0 (off) and 1"),
    ("min_p", 1.5, "between 0 (off) and 1"),
    ("repetition_penalty", 0.0, "positive"),
    ("repetition_penalty", -1.0, "positive"),
    ("presence_penalty", math.inf, "finite"),
    ("frequency_penalty", math.nan, "finite"),
    ("seed", -1, "from 0 to 2**32 - 1"),
    ("seed", 2**32 - 2, "from 0 to 2**32 - 1"),  # the third row's would not fit
    ("seed", 1.5, "a whole number from 0"),
    ("seed", None, "a whole number from 0"),
    ("seed", [1, 2], "one for each of 3 rows"),
    ("seed", [1, 2, 3.5], "whole number"),
    ("rule", "hope", "coupled, rejection"),
    ("logit_bias", {9: 1.0}, "ids from 0 to 8"),
    ("logit_bias", {"a": 1.0}, "ids from 0 to 8"),
    ("logit_bias", {1: math.inf}, "a finite number, or -inf"),
    ("logit_bias", {1: math.nan}, "a finite number, or -inf"),
    ("logit_bias", {1: "x"}, "a finite number, or -inf"),
    ("logit_bias", [{1: 1.0}], "a list of one for each of 3 rows"),
    ("logit_bias", [{1: 1.0}, None, {}], "a list of one for each of 3 rows"),
    ("logit_bias", 3.0, "a list of one for each of 3 rows"),
    ("stop_token_ids", [-1], "token id"),
    ("stop_token_ids", [1.5], "token id"),
    ("stop_token_ids", ["a"], "token id"),
    ("stop_token_ids", 5, "token id"),
]


@pytest.mark.parametrize(("name", "value", "need"), BAD)
def test_create_refuses_with_a_sentence(name, value, need):
    with pytest.raises(ValueError, match=name) as error:
        Sampling.create(3, 9, **{name: value})
    assert need in str(error.value)


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
