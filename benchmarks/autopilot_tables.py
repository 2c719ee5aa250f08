"""The tables of drafts whose lengths are chosen, beside those of fixed lengths, from results of autopilot.py."""

from statistics import geometric_mean


def speeds(result: dict) -> str:
    """Return the speeds of all stacks over plain decoding by how tokens are chosen, and how the chosen lengths compare."""
    choices = result["speeds"]
    lines = [f"| drafts | {' | '.join(choices)} |", "|---" * (len(choices) + 1) + "|"]
    names = [name for name in next(iter(choices.values())) if name != "none"]
    for name in sorted(names, key=kind):
        cells = (told(found[name]["speed"]) for found in choices.values())
        lines.append(f"| {label(name)} | {' | '.join(cells)} |")
    runs = [found[name] for found in choices.values() for name in names]
    rows = "one prompt at a time" if result["batch"] == 1 else f"batches of {result['batch']}"
    what = f"median of {result['trials']} trials (least to greatest); {result['prompts']} prompts, {result['new']} new tokens each"
    equal = f"{sum(run['equal'] for run in runs)} of {len(runs)} gave plain decoding's tokens in every row"
    note = f"Times the speed of plain decoding, {what}, {rows}. {equal}. {against_fixed(choices)}"
    return "\n".join([*lines, "", note])


def kind(name: str) -> int:
    """Return 0 for fixed lengths, 1 for chosen ones, 2 for drafts that are turned off."""
    return 2 if "draft_limit" in name else int(":" not in name)


def label(name: str) -> str:
    """Return how a table calls a stack."""
    drafts, off, more = name.partition(" with ")
    return f"`{drafts}`{off}{more}" + ", lengths as they pay" * (kind(name) == 1)


def told(speed: dict[str, float]) -> str:
    """Return median and spread of a speed."""
    return f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})"


def against_fixed(choices: dict[str, dict]) -> str:
    """Return what the best stack with chosen lengths makes of the best of fixed lengths, in hindsight, and its worst trial."""
    ratios, worst = [], []
    for found in choices.values():
        fixed = max(each["speed"]["median"] for name, each in found.items() if name != "none" and kind(name) == 0)
        auto = {name: each["speed"]["median"] for name, each in found.items() if name != "none" and kind(name) == 1}
        ratios.append(max(auto.values()) / max(fixed, 1.0))
        worst.append(min(auto.values()))
    return (
        f"The best of chosen lengths is {geometric_mean(ratios):.2f} times as fast as the best of fixed ones or plain decoding, "
        f"all known in hindsight; the slowest of chosen lengths makes {min(worst):.2f} of plain decoding."
    )
