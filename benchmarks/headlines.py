"""The README's four headline rows, from the results that the tables are made from."""

from accelerator_tables import fastest_plain, program_runs
from cpu_tables import over_plain

TWIN = "mxfp4"
ACCEPTANCE = 0.9  # of the coins, where weights are random and nothing could be accepted


def headlines(results: dict[str, dict]) -> str:
    """Return the table of what was measured where, and by which command."""
    rows = [large(results["decode-cpu"]), small(results["autopilot-SmolLM2-135M"])]
    rows += [gpu(results["accelerator-h200"]), accepted(results["acceptance-SmolLM2-135M"])]
    lines = ["| model, on | stack | measured | by |", "|---" * 4 + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def large(result: dict) -> tuple[str, ...]:
    """Return the row of the large random model: the fastest stack at the acceptance of a good twin, the coins' luck taken away."""
    found = {name: over_plain(result, name)[1] for name, (_, rates) in result["stacks"].items() if rates[:1] == [ACCEPTANCE]}
    name = max(found, key=found.get)
    tokens = result["new"] / result["generation_seconds"]["plain"]["median"]
    lengths, rates = result["stacks"][name]
    drafts = f"its MXFP4 twin ({lengths[0]} tokens, coins accept {rates[0]}), look-up below ({lengths[1]}, {rates[1]})"
    what = f"{found[name]:.2f} x plain decoding's {tokens:.1f} tokens/s, the coins' luck taken away"
    return f"1.1B parameters, random weights; {cores(result)}", drafts, what, command(result)


def small(result: dict) -> tuple[str, ...]:
    """Return the row of a real small model: its twin, with look-up beside it, drafting as many tokens as pay."""
    speeds = {choice: found[TWIN]["speed"]["median"] for choice, found in result["speeds"].items()}
    equal = all(found[TWIN]["equal"] for found in result["speeds"].values())
    told = ", ".join(f"{speed:.2f} x {'at ' * (choice != 'greedy')}{choice}" for choice, speed in speeds.items())
    plain = 1 / result["costs"][TWIN]["plain_seconds"]
    what = f"{told}, over plain decoding's {plain:.0f} tokens/s{'; the same tokens' * equal}"
    return f"SmolLM2-135M; {cores(result)}", "its MXFP4 twin and look-up, lengths as they pay (`mxfp4`)", what, command(result)


def gpu(result: dict) -> tuple[str, ...]:
    """Return the row of a GPU: what the twin and look-up below it make of a large model."""
    judged = [run for _, run in program_runs(result) if run["exact"] and run["acceptance"]]
    runs = {(run["stack"], *run["acceptance"]): run["tokens_per_second"] for run in judged}  # as compiled today where both were run
    plain = fastest_plain(result)["tokens_per_second"]
    nested = next(key for key in runs if key[:2] == ("nested", ACCEPTANCE))
    drafts = f"the twin (8 tokens, coins accept {ACCEPTANCE}), look-up below ({nested[2]})"
    alone = f"the twin alone {runs['twin', ACCEPTANCE] / plain:.2f} x"
    what = f"{runs[nested] / plain:.2f} x plain decoding's {plain:.0f} tokens/s; {alone}"
    return f"Llama-3.1-8B's shape, random weights; {result['device']}", drafts, what, command(result)


def accepted(result: dict) -> tuple[str, ...]:
    """Return the row of what a real model accepts of its twin's drafts, and whether the text stayed the same."""
    runs = {(run["stack"], run["choice"]): run["levels"][0] for run in result["runs"]}
    greedy, coupled = (runs["mxfp4:6", choice] for choice in ("greedy", "coupled"))
    judged = [run["equal"] for run in result["runs"] if run["equal"] is not None]
    what = (
        f"{greedy['token_acceptance']:.0%} of judged tokens accepted greedily, {coupled['token_acceptance']:.0%} at T = 0.8; "
        f"{sum(judged)} of {len(judged)} runs equal to plain decoding, token for token"
    )
    return f"SmolLM2-135M; {result['prompts']} code and reasoning prompts", "`mxfp4:6`", what, command(result)


def cores(result: dict) -> str:
    return f"{result['cores']} cores of {result['cpu'].removesuffix(' Processor')}"


def command(result: dict) -> str:
    """Return the command of a result, up to what its table alone spells out."""
    shown, rest, _ = result["command"].partition(" --only")
    return f"`{shown}{' ...' * bool(rest)}`"
