"""The formulae against closed forms, against rounds that are tossed, and against the counts of a compiled generation."""

import numpy as np
import pytest
from chains import CHAINS, PROMPTS, B, S, generate, sampling_of, stack_of, toy, with_models
from toys import level_counts

from mlspecqd_jax.speculation.level import SLACK
from mlspecqd_jax.speculation.theory import (
    Profile,
    fill,
    match_rate,
    one_round,
    pass_time,
    rounds_for,
    speedup,
    survival,
    tokens_per_round,
)


def line(base, slope):
    """T(rows) of a pass of which each further row costs as much again."""
    return lambda rows: base + slope * (rows - 1)


def falling(rate, n):
    return [rate * 0.97**k for k in range(n)]


TARGET, TWIN, SMALL = line(1, 0.02), line(0.3, 0.01), line(0.04, 0.005)
STACKS = {
    "one level": [Profile(TARGET, [0.8] * 5), Profile(TWIN)],
    "look-up": [Profile(TARGET, [0.5, 0.8, 0.9, 0.9], 0.4)],
    "small, fed again": [Profile(TARGET, falling(0.7, 4)), Profile(SMALL, refeed=1)],
    "twin > look-up": [Profile(TARGET, falling(0.92, 5)), Profile(TWIN, [0.6, 0.7, 0.8], 0.45)],
    "static, twin > small": [
        Profile(TARGET, falling(0.9, 8), static=True),
        Profile(TWIN, [0.8] * 7, static=True),
        Profile(SMALL, refeed=2),
    ],
    "own > its twin > look-up": [
        Profile(TARGET, falling(0.9, 8)),
        Profile(line(0.4, 0.03), falling(0.8, 4), refeed=1),
        Profile(line(0.1, 0.01), [0.7, 0.8], 0.5),
    ],
    "padded": [
        Profile(lambda rows: 1.0 if rows <= 8 else 1.4, [0.9] * 9),
        Profile(lambda rows: 0.3 * -(-rows // 4), [0.5, 0.2], 0.9),
    ],
}


class Tossed:
    """Rounds as coins fall, in which the tokens themselves are laid out: True where a level chose what was drafted."""

    def __init__(self, levels, rng):
        self.levels, self.rng, self.clock = levels, rng, 0.0

    def text(self, depth, n, refed=0):
        """Append n tokens."""
        written = []
        while len(written) < n:
            written += self.round(depth, n - len(written), refed if not written else 0)
        return written

    def round(self, depth, missing, refed):
        level = self.levels[depth]
        draft = []
        if missing > 1 and level.acceptance and self.rng.random() < level.match:
            draft = self.draft(depth + 1, min(missing - 1, len(level.acceptance)), refed)
        window = len(level.acceptance) if level.static else len(draft)
        self.clock += level.time(refed + window + 1)
        tokens = []
        for h, _ in zip(level.acceptance, draft, strict=False):
            tokens.append(self.rng.random() < h)
            if not tokens[-1]:
                return tokens
        return [*tokens, False]

    def draft(self, depth, n, refed):
        if depth == len(self.levels):
            return [False] * n
        own = self.levels[depth].refeed
        return self.text(depth, n, refed if own is None else own)


def assert_mean(samples, expected):
    """Within 4 standard errors."""
    bound = 4 * np.std(samples) / np.sqrt(len(samples))
    assert np.mean(samples) == pytest.approx(expected, abs=bound + 1e-9)


@pytest.mark.parametrize("name", STACKS)
def test_a_round_and_a_text_are_those_of_tossed_coins(name):
    levels, rng = STACKS[name], np.random.default_rng(len(name))
    tossed, tokens, times, texts = Tossed(levels, rng), [], [], []
    for _ in range(4000):
        tossed.clock = 0.0
        tokens.append(len(tossed.round(0, 10**6, 0)))
        times.append(tossed.clock)
    for _ in range(1000):
        tossed.clock = 0.0
        assert len(tossed.text(0, 21)) == 21
        texts.append(tossed.clock)
    expected = one_round(levels)
    assert_mean(tokens, expected.tokens)
    assert_mean(times, expected.time)
    assert_mean(texts, fill(levels, 21))
    ratio = np.mean(tokens) / np.mean(times)  # the long run, in which rounds are all there is
    assert speedup(levels) == pytest.approx(ratio * levels[0].time(1), rel=0.03)


def test_survival_by_counts_and_by_hazards():
    assert tokens_per_round([60, 30, 0], 100) == pytest.approx(1.9)
    assert survival([0.5, 0.4, 0.9], 0.5) == pytest.approx([0.25, 0.1, 0.09])
    assert tokens_per_round([]) == 1
    assert tokens_per_round(survival([1.0] * 7)) == 8
    for a in (0.3, 0.9, 0.999):  # the closed form of one level
        assert tokens_per_round(survival([a] * 5)) == pytest.approx((1 - a**6) / (1 - a))


def test_plain_decoding_and_drafts_of_which_all_or_none_are_accepted():
    assert fill([Profile(TARGET)], 9) == 9
    assert fill([], 4) == 0
    assert one_round([Profile(TARGET)]) == (1, 1)
    assert speedup([Profile(TARGET)]) == 1
    right = [Profile(TARGET, [1.0] * 3), Profile(TWIN, [1.0])]
    # Appended are 4, 4 and 2 tokens; the twin makes its drafts of 3 in rounds of 2 and 1, that of 1 without a draft.
    assert fill(right, 10) == pytest.approx(2 * (TARGET(4) + TWIN(2) + TWIN(1)) + TARGET(2) + TWIN(1))
    wrong = [Profile(TARGET, [0.0] * 3), Profile(TWIN)]
    assert fill(wrong, 4) == pytest.approx(TARGET(4) + 3 * TWIN(1) + TARGET(3) + 2 * TWIN(1) + TARGET(2) + TWIN(1) + TARGET(1))
    static = [Profile(TARGET, [0.0] * 3, 0.0, static=True), Profile(TWIN)]
    assert fill(static, 4) == pytest.approx(4 * TARGET(4))
    # The last shares its verifier's cache, and is fed again what that is.
    own = [Profile(TARGET, [1.0] * 3), Profile(TWIN, [1.0], refeed=2), Profile(SMALL)]
    assert one_round(own).time == pytest.approx(TARGET(4) + TWIN(2 + 2) + SMALL(2 + 1) + TWIN(1))


def test_rounds_for_a_text():
    for n in (1, 6, 25):
        assert rounds_for(n, [1.0] * 3) == -(-n // 4)
        assert rounds_for(n, [0.0] * 3) == rounds_for(n, []) == rounds_for(n, [0.9] * 3, match=0) == pytest.approx(n)
    assert rounds_for(0, [0.5]) == 0
    # Both accepted; one, and a round for the last; none, and a draft of one.
    assert rounds_for(3, [0.6, 0.5]) == pytest.approx(0.3 * 1 + 0.3 * 2 + 0.4 * (0.6 * 2 + 0.4 * 3))


def test_speedup_of_one_level_is_the_closed_form():
    """Leviathan et al., theorem 3.8: (1 - a^(g + 1)) / ((1 - a) (1 + g c)); MXFP4 throughout reads 0.266 of the bytes."""
    levels = [Profile(lambda rows: 1.0, [0.9] * 5), Profile(lambda rows: 0.266)]
    assert speedup(levels) == pytest.approx((1 - 0.9**6) / (0.1 * (1 + 5 * 0.266)))
    assert speedup(levels) == pytest.approx(2.01, abs=0.005)


def test_nested_drafts_cost_less_than_whole_rounds_of_whole_drafts():
    """What a product of powers makes of them: whole inner rounds, each with a whole draft, are up to 8 percent too slow."""
    levels = [Profile(line(1, 0.02), [0.9] * 8), Profile(line(0.28, 0.0056), [0.8] * 7), Profile(lambda rows: 0.03)]
    tokens, time = one_round(levels)
    whole = 1 + 8 * 0.02 + rounds_for(8, [0.8] * 7) * (7 * 0.03 + 0.28 * (1 + 7 * 0.02))
    assert 0.03 < tokens / time * whole / tokens - 1 < 0.09


@pytest.mark.parametrize("match", [0.0, 0.05, 0.4, 0.8, 0.97, 1.0])
def test_match_rate_is_found_from_how_many_rounds_had_a_draft(match):
    for n, acceptance in ((6, [0.5, 0.7, 0.8]), (64, [0.9] * 4), (3, [0.0, 0.0])):
        levels = [Profile(lambda rows: 0.0 if rows == 1 else 1.0, acceptance, match)]
        share = fill(levels, n) / rounds_for(n, acceptance, match)
        assert share < match or match == 0
        assert match_rate(share, acceptance, n) == pytest.approx(match, abs=1e-3)
    assert match_rate(0.99, [0.5], 2) == 1  # more than any rate gives


def test_pass_time_is_linear_between_what_was_measured():
    time = pass_time({8: 20.0, 1: 10.0, 4: 13.0})
    assert [time(rows) for rows in (1, 2, 4, 6, 8, 12)] == [10, 11, 13, 16.5, 20, 27]


def modelled(name, rates, prices, seed):
    """Return the time of every row of a generation by its counts, T_i(rows) = base_i + slope_i rows, and what `fill` expects."""
    kinds, depths = name.split(">"), range(with_models(name))
    stack = stack_of(name, [toy.table(5 + i) for i in depths[1:]])
    sampling = sampling_of(rule="coupled", seed=seed, temperature=1, synthetic_acceptance=rates)
    _, state = generate(stack, [S - SLACK] * B, sampling)
    counts = level_counts(state)
    refeed = [i if i and kinds[i - 1] == "own" else None for i in depths]  # law 3: as many as levels are above
    levels, times = [], 0
    for i in depths:
        base, slope = prices[i]
        acceptance = [rates[i]] * CHAINS[name][i] if i < len(rates) else []
        levels.append(Profile(line(base + slope, slope), acceptance, refeed=refeed[i]))
        rows = counts[i].rounds + counts[i].drafted
        if refeed[i]:  # in the first round of each draft that its verifier asked for
            rows = rows + refeed[i] * counts[i - 1].judged[:, 0]
        times = times + base * counts[i].rounds + slope * rows
    return times, np.array([fill(levels, S - SLACK - len(prompt)) for prompt in PROMPTS])


@pytest.mark.parametrize(
    ("name", "rates", "prices"),
    [
        ("shared>ngram", (0.7, 0.9), [(1, 0.1), (0.5, 0.2)]),
        pytest.param("own>own", (0.8, 0.6), [(1, 0.1), (0.5, 0.2), (0.1, 0.3)], marks=pytest.mark.slow),
        pytest.param("own>shared>own", (0.8, 0.7, 0.6), [(1, 0.1), (0.5, 0.2), (0.3, 0), (0.1, 0.3)], marks=pytest.mark.slow),
    ],
)
def test_a_compiled_generation_takes_what_fill_expects(name, rates, prices):
    """Coins of a level do not depend on those of another, so that means agree though positions are drafted more than once."""
    for certain in ([1.0] * len(rates), [0.0] * len(rates), [1.0, *[0.0] * (len(rates) - 1)]):
        times, expected = modelled(name, certain, prices, seed=0)
        np.testing.assert_allclose(times, expected, rtol=1e-9)
    times, expected = map(np.concatenate, zip(*(modelled(name, rates, prices, 1000 * seed) for seed in range(8)), strict=True))
    assert_mean(times - expected, 0)
    assert np.std(times - expected) / np.sqrt(len(times)) < 0.02 * np.mean(expected)  # the bound is no empty one
