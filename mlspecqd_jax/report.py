"""What a generation did: counts per level and per request, and the rates made from them (the words are vLLM's)."""

import dataclasses
from typing import Any

import jax
import numpy as np

from mlspecqd_jax.levels import Counts, Level


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one generation: `seconds` from the first prompt token fed to the last token on the host, compilation apart."""

    seconds: float
    compile_seconds: float


def summarize(counts: Counts, row: int | None = None) -> dict[str, Any]:
    """Return counts and rates of a level's drafts, of all rows or of one.

    acceptance_rate = accepted / drafted; token_acceptance = accepted / judged; acceptance_by_position[i] =
    P(i accepted | i judged); mean_acceptance_length = 1 + accepted / rounds. A rate without anything to count is None.
    """
    rows = slice(None) if row is None else slice(row, row + 1)
    rounds, drafted = int(counts.rounds[rows].sum()), int(counts.drafted[rows].sum())
    accepted, judged = counts.accepted[rows].sum(axis=0), counts.judged[rows].sum(axis=0)
    drafts = accepted.size > 0
    return {
        "rounds": rounds,
        "drafted": drafted,
        "accepted": int(accepted.sum()),
        "judged": int(judged.sum()),
        "acceptance_rate": _ratio(accepted.sum(), drafted),
        "token_acceptance": _ratio(accepted.sum(), judged.sum()),
        "mean_acceptance_length": 1 + accepted.sum().item() / rounds if drafts and rounds else None,
        "acceptance_by_position": [_ratio(a, j) for a, j in zip(accepted, judged, strict=True)],
    }


def build(stack: Level, counts: Counts, rule: str, new_tokens: list[int], timing: Timing) -> dict[str, Any]:
    """Return the report of one generation as plain JSON values; levels[0] is the target."""
    counts = jax.tree.map(np.asarray, counts)
    level = {"name": stack.card.name, "draft_len": stack.draft_len} | summarize(counts) | {"passes": int(counts.passes)}
    leaf = jax.tree.leaves(stack.params)[0]
    total = sum(new_tokens)
    return {
        "levels": [level],
        "requests": [summarize(counts, row) | {"new_tokens": n} for row, n in enumerate(new_tokens)],
        "rule": rule,
        "exact": stack.card.exact,
        "dtype": leaf.dtype.name,
        "device": next(iter(leaf.devices())).device_kind,
        "new_tokens": total,
        "seconds": timing.seconds,
        "compile_seconds": timing.compile_seconds,
        "tokens_per_second": total / timing.seconds if timing.seconds > 0 else None,
        "speedup": None,
    }


def _ratio(part, whole) -> float | None:
    return float(part) / float(whole) if whole else None
