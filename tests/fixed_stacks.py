"""What stacks of fixed lengths take to write texts that are played (`players`): by plain loops, for every length of a grid.

Where a twin's draft is wrong, what look-up finds and a small draft proposes in it is taken to be what they would on the text.
"""

import numpy as np
from oracles import lookup_oracle
from players import INNER, OUTER, SMALL, TARGET, TWIN

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15)
NESTED = (1, 2, 3, 5, 7)


def speeds(played, times):
    """Return the speed over plain decoding of every stack of the grid, {(drafts, length, inner length): speed}."""
    right = _right(played)
    chains = [("lookup", g, 0) for g in LENGTHS] + [("twin", g, 0) for g in LENGTHS]
    inside = ["lookup"] + ["small"] * ("small" in right)
    chains += [(f"twin<{kind}", g, h) for kind in inside for g in LENGTHS for h in NESTED if h < g]
    chains += [("small", g, 0) for g in LENGTHS if "small" in right]
    plain = played.new * len(played.text) * times[TARGET, 1]
    return {("plain", 0, 0): 1.0} | {chain: plain / _time(played, right, times, *chain) for chain in chains}


def _right(played):
    """Return how many leading tokens of each proposal at each place are the text's, {drafts: int [R, N]}, and hits [R, N, G]."""
    shape = played.twin.shape
    place = played.begin[:, None, None] + np.arange(shape[1])[None, :, None] + np.arange(shape[2])[None, None, :]
    r = np.arange(shape[0])[:, None, None]
    own = played.text[r, np.minimum(place, played.text.shape[1] - 1)]
    proposals = np.full(shape, -1)
    for row, (text, begin) in enumerate(zip(played.text.tolist(), played.begin, strict=True)):
        for n in range(shape[1]):
            found = lookup_oracle(text[: begin + n], shape[2])
            proposals[row, n, : len(found)] = found
    right = {"hit": played.twin == own, "found": proposals[..., 0] >= 0, "lookup": np.cumprod(proposals == own, -1).sum(-1)}
    if played.small is not None:
        small = played.small[r, np.minimum(place, played.text.shape[1] - 1)]
        right["small"] = np.cumprod(small == own, -1).sum(-1)
    return right


def _time(played, right, times, drafts, length, inner_length):
    assert length <= OUTER
    assert inner_length <= INNER
    name, _, inner = drafts.partition("<")
    total = 0.0
    for row in range(len(played.text)):
        place = 0
        while place < played.new:
            wanted = min(length, played.new - place - 1)
            if name == "lookup":
                drafted = wanted if right["found"][row, place] else 0
                accepted = min(right["lookup"][row, place], drafted)
            elif name == "small":
                drafted, accepted = wanted, min(right["small"][row, place], wanted)
                total += wanted * times[SMALL, 1]
            else:
                drafted, hits = wanted, right["hit"][row, place, :wanted]
                accepted = int(np.cumprod(hits).sum())
                total += _twin(right, times, row, place, wanted, inner, inner_length)
            total += times[TARGET, drafted + 1]
            place += accepted + 1
    return total


def _twin(right, times, row, place, wanted, inner, inner_length):
    """Return the time in which the twin drafts so many tokens from a place on."""
    done, total = 0, 0.0
    while done < wanted:
        use = min(inner_length, wanted - done - 1) if inner else 0
        here = min(place + done, right["hit"].shape[1] - 1)
        if inner == "lookup" and not right["found"][row, here]:
            use = 0
        good = np.cumprod(right["hit"][row, place, done : done + use]).sum()
        accepted = int(min(right[inner][row, here], use, good)) if use else 0
        total += times[TWIN, use + 1] + (use * times[SMALL, 1] if inner == "small" else 0)
        done += accepted + 1
    return total
