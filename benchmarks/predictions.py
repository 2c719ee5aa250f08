"""What counts were and what theory makes of a report's acceptance by position and match rates, as the tables show them."""

from mlspecqd_jax.speculation.theory import Profile, fill, match_rate, rounds_for


def tokens_a_round(levels: list[dict], prompts: int) -> str:
    """Return tokens of a round of the target: `measured (predicted)`."""
    target = levels[0]
    new = tokens_each(target, prompts)
    judged = judgement(levels, 0, new)
    return shown(target["mean_acceptance_length"], None if judged is None else new / rounds_for(new, *judged))


def inner_rounds_a_round(levels: list[dict], prompts: int) -> str:
    """Return rounds of the second level for one of the target: `measured (predicted)`."""
    outer, inner = levels[:2]
    new = tokens_each(outer, prompts)
    above, below = judgement(levels, 0, new), judgement(levels, 1, outer["draft_len"])
    measured = inner["rounds"] / outer["rounds"]
    if above is None or below is None:
        return shown(measured, None)
    rounds = fill([Profile(lambda rows: 0.0, *above), Profile(lambda rows: 1.0, *below)], new)
    return shown(measured, rounds / rounds_for(new, *above))


def judgement(levels: list[dict], i: int, new: int) -> tuple[list[float], float] | None:
    """Return acceptance by position and match rate of the drafts that level i judges, `new` tokens at a time.

    None for look-up where a result is older than `judged_by_position`, without which nothing tells how often it found a match.
    """
    level, drafter = levels[i : i + 2]
    acceptance = [rate or 0.0 for rate in level["acceptance_by_position"]]
    if drafter["passes"]:  # a model drafts whenever a draft is of use
        return acceptance, 1.0
    if "judged_by_position" not in level:
        return None
    return acceptance, match_rate(level["judged_by_position"][0] / level["rounds"], acceptance, new)


def tokens_each(target: dict, prompts: int) -> int:
    """Return the new tokens of a request, on average."""
    return round((target["accepted"] + target["rounds"]) / prompts)


def shown(measured: float, predicted: float | None) -> str:
    return f"{measured:.2f}" if predicted is None else f"{measured:.2f} ({predicted:.2f})"
