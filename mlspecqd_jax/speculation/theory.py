"""What drafts are worth: the tokens of a round, and the time in which levels of any depth append them.

The closed forms of Leviathan et al. (arXiv 2211.17192, section 3) are these formulae for one level whose every round drafts as much
and whose every position is accepted alike. Nested levels draft no more than is of use, look-up drafts only where it finds a match,
and acceptance depends on the position, so that products of powers are off by several percent; the recursion below is not.

Notation: T(rows) time of a pass over so many positions, in any unit; G draft_len; m match rate; h_k = P(k accepted | k judged), a
report's `acceptance_by_position` (one less the hazard of survival analysis); S_k = P(k accepted), the survival; E expected. Levels
go from the target inwards. Given m and h, times are exact if rounds are independent of each other.
"""

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Profile(NamedTuple):
    """A level as time sees it.

    time: T(rows), with whatever else a round of this level takes, such as the search of a look-up that drafts for it.
    acceptance: h_1 to h_G of the drafts that it judges; () of a level without a drafter.
    match: P(a draft is proposed) where one is of use: 1, but for look-up.
    refeed: how many tokens a cache of its own is fed again in the first pass of a draft; None where the level shares its verifier's
      cache, and is fed again what that is.
    static: whether a window has the rows of a whole draft, instead of those of what was drafted.
    """

    time: Callable[[float], float]
    acceptance: Sequence[float] = ()
    match: float = 1.0
    refeed: float | None = None
    static: bool = False


class Round(NamedTuple):
    """The expected tokens of a round, the verifier's own included, and its expected time."""

    tokens: float
    time: float


def tokens_per_round(accepted: Sequence[float], rounds: float = 1) -> float:
    """E[tokens] = 1 + sum_k S_k, S_k = accepted[k] / rounds: exact, whatever depends on what.

    `rounds` are all of them, also those without a draft. What drafts of g tokens would give is the sum of the first g, as long as
    other rounds do not begin elsewhere.
    """
    return 1 + sum(accepted) / rounds


def survival(acceptance: Sequence[float], match: float = 1.0) -> list[float]:
    """S_k = m h_1 ... h_k."""
    return list(itertools.accumulate(acceptance, lambda alive, h: alive * h, initial=match))[1:]


def fill(levels: Sequence[Profile], n: int) -> float:
    """F_i(r) = T_i + m F_(i+1)(g) + sum_k P(k of g accepted) F_i(r - k - 1), g = min(G, r - 1), F(0) = 0: time of n tokens, F_0(n).

    The last of r missing tokens comes from the level itself, so at most r - 1 drafted ones are of use. T_i is T(g + 1) with a draft
    and T(1) without one; a static window has G + 1 rows; in the first pass of a draft come those that are fed again. What drafts
    below the last level, if anything does, takes no time.
    """
    return _fills(levels, n, 0)[n]


def one_round(levels: Sequence[Profile]) -> Round:
    """(E[tokens], E[time]) of a round of the target far from the end: 1 + sum_k S_k, and T_0 + m F_1(G)."""
    target, *below = levels
    g = len(target.acceptance)
    time = _round_time(target, g, _fills(below, g, 0)[g], 0)
    return Round(tokens_per_round(survival(target.acceptance, target.match)), time)


def speedup(levels: Sequence[Profile]) -> float:
    """E[tokens] / E[time] T_0(1): speed over plain decoding in the long run, for which rounds need only be stationary."""
    tokens, time = one_round(levels)
    return tokens / time * levels[0].time(1)


def rounds_for(n: int, acceptance: Sequence[float], match: float = 1.0) -> float:
    """R(n) = 1 + sum_k P(k of g accepted) R(n - k - 1): expected rounds in which a level appends n tokens, `fill` with T = 1."""
    return fill([Profile(lambda rows: 1.0, acceptance, match)], n)


def match_rate(share: float, acceptance: Sequence[float], n: int) -> float:
    """Return m at which such a share of rounds has a draft where n tokens are appended: judged_by_position[0] / rounds of a report.

    The share itself is less than m, since a round of one missing token asks for no draft.
    """

    def share_at(match):
        drafted = fill([Profile(lambda rows: float(rows > 1), acceptance, match)], n)
        return drafted / rounds_for(n, acceptance, match)

    return bisect.bisect_left(range(2**12), share, key=lambda step: share_at(step / 2**12)) / 2**12


def pass_time(measured: Mapping[int, float]) -> Callable[[float], float]:
    """Return T(rows) from times at two numbers of rows or more: linear between them, and beyond them as between the nearest two."""
    pairs = list(itertools.pairwise(sorted(measured)))

    def time(rows: float) -> float:
        a, b = next((pair for pair in pairs if rows <= pair[1]), pairs[-1])
        return measured[a] + (rows - a) * (measured[b] - measured[a]) / (b - a)

    return time


def _fills(levels: Sequence[Profile], most: int, refed: float) -> list[float]:
    """Return F(0) to F(most) of the first level, whose verifier feeds `refed` tokens again in the pass that the draft is for."""
    if not levels:
        return [0.0] * (most + 1)
    level, *below = levels
    g = len(level.acceptance)
    mine = refed if level.refeed is None else level.refeed
    drafting, drafting_first = _fills(below, g, 0), _fills(below, g, mine)
    first, later = [0.0], [0.0]
    for r in range(1, most + 1):
        use = min(g, r - 1)
        alive = [1.0, *survival(level.acceptance[:use], level.match), 0.0]
        rest = sum((alive[k] - alive[k + 1]) * later[r - k - 1] for k in range(use + 1))
        first.append(_round_time(level, use, drafting_first[use], mine) + rest)
        later.append(_round_time(level, use, drafting[use], 0) + rest)
    return first


def _round_time(level: Profile, use: int, drafting: float, refed: float) -> float:
    """Return the time of a round in which `use` drafted tokens are of use, and drafting them takes `drafting`."""

    def of_pass(drafted):
        return level.time(1 + refed + (len(level.acceptance) if level.static else drafted))

    match = level.match if use else 0.0
    return (1 - match) * of_pass(0) + match * (of_pass(use) + drafting)
