"""What a generation did: counts per level and per request, and the rates made from them (the words are vLLM's)."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlspecqd_jax.speculation.autopilot import Autopilot
from mlspecqd_jax.speculation.counts import Counts
from mlspecqd_jax.speculation.guide import LOOKUP, MODEL
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.stack import Stack
from mlspecqd_jax.speculation.state import State, counts_of
from mlspecqd_jax.speculation.theory import tokens_per_round

SOURCES = {LOOKUP: "lookup", MODEL: "model"}
JUDGED, COLLAPSED = 64, 0.2  # a token acceptance below this, among at least so many judged, is warned of
DRIFTED = 0.25  # and rounds, of as many, that take so much more or less than by the plan


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one generation: `seconds` from the first prompt token fed to the last token on the host, compilation apart.

    `prefill_seconds` and `round_seconds`: the parts of them in which prompts were fed and rounds ran, not the caller's of a stream.
    """

    seconds: float
    prefill_seconds: float
    round_seconds: float
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
        "mean_acceptance_length": tokens_per_round(accepted.tolist(), rounds) if drafts and rounds else None,
        "acceptance_by_position": [_ratio(a, j) for a, j in zip(accepted, judged, strict=True)],
        "judged_by_position": judged.tolist(),
    }


def passes_of(counts: Counts) -> dict[str, Any]:
    """Return a level's passes, also by rows in use, and its verdicts by source and class (`guide`), where drafts told theirs.

    experts_per_pass: of how many different experts a layer read the weights, on average; None of a model without experts.
    """
    found = {
        "passes": int(counts.by_rows.sum()),
        "passes_by_rows": {str(rows): int(n) for rows, n in enumerate(counts.by_rows) if n},
        "experts_per_pass": None if counts.experts is None else _ratio(counts.experts, counts.by_rows.sum()),
    }
    by_class = counts.by_class.sum(axis=1)  # [2, 8, 2]
    for word, of in (("accepted", 0), ("judged", 1)):
        found[f"{word}_by_source"] = {name: int(by_class[source, :, of].sum()) for source, name in SOURCES.items()}
        found[f"{word}_by_class"] = {name: by_class[source, :, of].tolist() for source, name in SOURCES.items()}
    return found


def seen_by_class(report: dict[str, Any], levels: int) -> np.ndarray:
    """Return what the levels of a stack accepted and judged in a run, by source and class (`guide`), int [L, 2, CLASSES, 2]."""
    return np.array(
        [
            [[level[f"{word}_by_class"][SOURCES[source]] for word in ("accepted", "judged")] for source in sorted(SOURCES)]
            for level in report["levels"][:levels]
        ]
    ).swapaxes(-1, -2)


def autopilot_of(state: State, seconds: float) -> dict[str, float | None] | None:
    """Return what the autopilot counted, in passes of plain decoding, or None where there was none.

    `time` of all rounds by its table; `speedup` over plain decoding by that table; `least_ahead`: how far rounds were ahead of
    plain decoding when they were the least so, below 0 where the allowance was drawn on; `drift`: by what part the `seconds` of
    the rounds exceed those by the table, None where that was not measured, which it is for one row alone.
    """
    if not isinstance(state.control, Autopilot):
        return None
    time, most = float(state.plan.time), int(state.plan.done.max())
    is_known = time and state.control.is_measured and len(state.length) == 1
    return {
        "time": time,
        "speedup": most / time if time else None,
        "least_ahead": float(state.plan.least) if time else None,
        "drift": seconds / (time * float(state.control.plain)) - 1 if is_known else None,
    }


def build(stack: Stack, state: State, sampling: Sampling, new_tokens: list[int], timing: Timing) -> dict[str, Any]:
    """Return the report of one generation as plain JSON values; levels[0] is the target, what it judges counted there."""
    counts = jax.device_get(counts_of(state))
    levels = [
        {"name": card.name, "draft_len": level.draft_len} | summarize(of_level) | passes_of(of_level)
        for card, level, of_level in zip(stack.cards, stack.levels, counts, strict=True)
    ]
    innermost = stack.levels[-1].drafter
    if innermost is not None:  # drafts without a model, so that there is nothing to count
        zeros = jax.eval_shape(lambda: Counts.zeros(len(new_tokens), 0))
        nothing = jax.tree.map(lambda count: np.zeros(count.shape, count.dtype), zeros)
        levels.append({"name": innermost.name, "draft_len": 0} | summarize(nothing) | passes_of(nothing))
    total = sum(new_tokens)
    rates = sampling.synthetic_acceptance
    return {
        "levels": levels,
        "requests": [
            summarize(counts[0], row) | {"new_tokens": n, "below": [summarize(of_level, row) for of_level in counts[1:]]}
            for row, n in enumerate(new_tokens)
        ],
        "rule": sampling.rule,
        "exact": stack.exact,
        "autopilot": autopilot_of(state, timing.round_seconds),
        "synthetic_acceptance": None
        if rates is None
        else [round(rate, 6) for rate in rates.tolist()],  # then the text is meaningless
        "dtype": dtype_of(stack),
        "device": next(iter(_leaf(stack).devices())).device_kind,
        "new_tokens": total,
        "seconds": timing.seconds,
        "prefill_seconds": timing.prefill_seconds,
        "compile_seconds": timing.compile_seconds,
        "tokens_per_second": total / timing.seconds if timing.seconds > 0 else None,
        "speedup": None,
    }


def warnings_of(report: dict[str, Any]) -> list[str]:
    """Return a sentence for each level whose drafts are hardly ever accepted, and one for times that are no longer true."""
    sentences = [
        f"{level['name']} accepts {level['token_acceptance']:.0%} of the tokens that {below['name']} drafts ({level['judged']} "
        "judged), which is hardly worth it; draft with another model, or draft fewer tokens"
        for level, below in itertools.pairwise(report["levels"])
        if report["synthetic_acceptance"] is None
        and report["autopilot"] is None
        and level["judged"] >= JUDGED
        and level["token_acceptance"] < COLLAPSED
    ]
    drift = (report["autopilot"] or {}).get("drift")
    if drift is not None and abs(drift) > DRIFTED and report["levels"][0]["rounds"] >= JUDGED:
        than = f"more than {1 + DRIFTED:g}" if drift > 0 else f"less than {1 - DRIFTED:g}"
        sentences.append(  # no figure that changes, so that it is said once
            f"rounds took {than} times what the plan's times say; if no other work ran here, 'mlspecqd plan' measures anew"
        )
    return sentences


def dtype_of(stack: Stack) -> str:
    """Return the name of the dtype of the target's weights that are not quantized."""
    return _leaf(stack).dtype.name


def _leaf(stack: Stack) -> jax.Array:
    return next(leaf for leaf in jax.tree.leaves(stack.level.params) if jnp.issubdtype(leaf.dtype, jnp.floating))


def _ratio(part, whole) -> float | None:
    return float(part) / float(whole) if whole else None
