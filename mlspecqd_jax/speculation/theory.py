"""What the acceptance of a draft is worth: tokens a round, inner rounds a draft, speed-up (Leviathan et al., arXiv 2211.17192).

Notation: a token acceptance (accepted / judged), g draft_len, c time of a pass of the draft over one of the target, d time of one
more verified position over time of a pass of the target.
"""


def tokens_per_round(a: float, g: int) -> float:
    """E = (1 - a^(g + 1)) / (1 - a): expected tokens of a round, the verifier's own included (section 3.1)."""
    return sum(a**i for i in range(g + 1))


def rounds_for(n: int, a: float, g: int) -> float:
    """R(n) = 1 + sum_k P(k) R(n - k - 1): expected rounds of a level, drafts of g judged at a, until n tokens are there."""
    chance = [a**k * (1 - a) for k in range(g)] + [a**g]
    needed = [0.0]
    for m in range(1, n + 1):
        # Of use are at most m - 1 drafted tokens, since the last comes from the level itself; more change nothing here.
        needed.append(1 + sum(p * needed[max(m - k - 1, 0)] for k, p in enumerate(chance)))
    return needed[n]


def speedup(a: float, g: int, cost: float, d: float = 0.0) -> float:
    """S = E / (1 + cost + g d): speed over plain decoding, for a draft of g tokens that costs `cost` passes of the target."""
    return tokens_per_round(a, g) / (1 + cost + g * d)
