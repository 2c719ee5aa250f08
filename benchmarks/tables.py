"""Writes the tables of benchmarks/README.md, and the README's headline rows, from the JSON under benchmarks/results.

python benchmarks/tables.py            # rewrite what stands between the markers
python benchmarks/tables.py --check    # exit 1 if a page says anything else, and name what
"""

import argparse
import json
import re
import sys
from pathlib import Path

import accelerator_tables
import aot_tables
import autopilot_tables
import cpu_tables
import headlines
import predictions
import startup_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def startup(result: dict) -> str:
    """Return the table of start-up times."""
    return f"{startup_tables.startup(result, spread)}\n\n{source(result)}"


def loading(result: dict) -> str:
    """Return the table of loading times and memory."""
    size = result["model_bytes"]
    lines = [f"| {size / 1e9:.1f} GB of BF16 weights | time | anonymous memory at most |", "|---|---|---|"]
    names = {"import": "import from safetensors", "convert": "write the converted checkpoint", "load": "load it (maps the files)"}
    for kind, name in names.items():
        lines.append(
            f"| {name} | {spread(result['seconds'][kind])} | {result['peak_anonymous_bytes'][kind] / size:.2f} x the weights |"
        )
    return "\n".join([*lines, "", source(result)])


def acceptance(result: dict) -> str:
    """Return the tables of acceptance by draft, by position and by level, and what was equal to plain decoding."""
    runs = {(run["stack"], run["choice"]): run for run in result["runs"]}
    stacks, choices = (list(dict.fromkeys(run[key] for run in result["runs"])) for key in ("stack", "choice"))
    head = " | ".join("greedy" if choice == "greedy" else f"{choice}, T = 0.8" for choice in choices)
    rates = [f"| drafts | token acceptance: {head} | tokens a round, greedy (predicted) |"]
    positions = ["| mxfp4:6, P(accepted if judged) at position | 1 | 2 | 3 | 4 | 5 | 6 |"]
    nested = ["| nested, greedy | token acceptance of the inner draft | inner rounds a round (predicted) |"]
    for table in (rates, positions, nested):
        table.append("|---" * (table[0].count("|") - 1) + "|")
    for name in stacks:
        greedy, *_ = chosen = [runs[name, choice] for choice in choices]
        each = " | ".join(f"{run['levels'][0]['token_acceptance']:.3f}" for run in chosen)
        levels, prompts = greedy["levels"], result["prompts"]
        rates.append(f"| {name} | {each} | {predictions.tokens_a_round(levels, prompts)} |")
        if levels[1]["draft_len"]:
            inner = predictions.inner_rounds_a_round(levels, prompts)
            nested.append(f"| {name} | {levels[1]['token_acceptance']:.3f} | {inner} |")
    for choice in choices:
        each = runs["mxfp4:6", choice]["levels"][0]["acceptance_by_position"]
        positions.append(f"| {choice} | {' | '.join(f'{rate:.3f}' for rate in each)} |")
    note = (
        "Predicted: from acceptance by position and from how often look-up finds a match, for texts of this length, as if rounds "
        "were independent of each other."
    )
    if any("judged_by_position" not in run["levels"][0] for run in result["runs"]):
        note += " Not so for look-up, whose matches were not counted yet."
    last = f"{environment(result)}; `{result['command']}`."
    nested = [*nested, ""] if len(nested) > 2 else []
    return "\n".join([*rates, "", *positions, "", *nested, note, equality(result), memory(result["memory"]), "", last])


def demo_acceptance(result: dict) -> str:
    """Return the table of what the demo accepts, a line for each draft and what judges it."""
    temperatures = sorted({row["temperature"] for row in result["rows"]})
    head = " | ".join("greedy" if t == 0 else f"T = {t:g}" for t in temperatures)
    lines = [f"| stack | token acceptance: {head} | tokens a round, greedy (predicted) |", "|---" * (len(temperatures) + 2) + "|"]
    found = {(row["stack"], row["judge"], row["temperature"]): row for row in result["rows"]}
    for stack, judge in dict.fromkeys((stack, judge) for stack, judge, _ in found):
        each = " | ".join(f"{found[stack, judge, t]['token_acceptance']:.3f}" for t in temperatures)
        greedy = found[stack, judge, temperatures[0]]
        tokens = f"{greedy['tokens_per_round']:.2f} ({greedy['predicted_tokens_per_round']:.2f})"
        lines.append(f"| {stack}{', the inner level' if judge else ''} | {each} | {tokens} |")
    twin = found["mxfp4", 0, 0]
    positions = ", ".join(f"{a:.3f}" for a in twin["acceptance_by_position"])
    what = f"{result['prompts']} prompts, {result['new_tokens']} new tokens each, {result['dtype']}"
    note = f"{what}. The mxfp4 twin, greedy, by position in the draft: {positions}."
    return "\n".join([*lines, "", note, "", f"{environment(result)}; `{result['command']}`."])


def equality(result: dict) -> str:
    """Return how many runs gave the tokens of plain decoding."""
    judged = [run["equal"] for run in result["runs"] if run["equal"] is not None]
    dtype, prompts, new = result["runs"][0]["dtype"], result["prompts"], result["new_tokens"]
    return (
        f"{sum(judged)} of {len(judged)} greedy and coupled runs gave, token for token, what plain decoding gives "
        f"({prompts} prompts in one batch, up to {new} new tokens each, {dtype})."
    )


def memory(m: dict) -> str:
    """Return what the twin costs in bytes."""
    share = m["twin_adds"] / m["bf16_bytes_of_what_is_quantized"]
    caches, temporary = (
        [f"{m[stack][kind]:,}" for stack in ("plain", "mxfp4:6", "mxfp4:6, own cache")] for kind in ("caches", "temporary")
    )
    return (
        f"The twin adds {m['twin_adds']:,} bytes to the model's {m['weights']:,}, {share:.4f} of the BF16 bytes of what it casts. "
        f"One row's caches take {caches[0]} bytes in plain decoding, {caches[1]} with the twin and {caches[2]} if it has its own; "
        f"the compiled loop takes {temporary[0]}, {temporary[1]} and {temporary[2]} bytes beside its arguments."
    )


def source(result: dict) -> str:
    """Return the line that says where a table of times comes from."""
    return f"{environment(result)}; median of {result['trials']} (least to greatest); `{result['command']}`."


def with_source(make):
    """Return `make` with the line after its table that says where the table comes from."""
    return lambda result: f"{make(result)}\n\n{environment(result)}; `{result['command']}`."


def environment(result: dict) -> str:
    """Return the machine and the versions of a result; where nothing is timed, the kind of device says enough, if one was used."""
    machine = f"{result['cores']} cores of {result['cpu']}" if "cores" in result else result.get("device")
    return ", ".join([*([machine] if machine else []), *(f"{name} {version}" for name, version in result["versions"].items())])


def spread(seconds: dict) -> str:
    """Return `median s (least to greatest)`."""
    digits = 1 if seconds["median"] >= 1 else 2
    median, least, most = (f"{seconds[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} s ({least} to {most})"


TABLES = {
    "startup-cpu": startup,
    "startup-SmolLM2-135M-cpu": startup,
    "compile": with_source(startup_tables.compiling),
    "loading-cpu": loading,
    "acceptance-stories260K": acceptance,
    "acceptance-SmolLM2-135M": acceptance,
    "acceptance-SmolLM2-135M-calibrated": acceptance,
    "acceptance-SmolLM2-135M-100": acceptance,
    "acceptance-demo": demo_acceptance,
    "matmul-cpu": with_source(cpu_tables.products),
    "decode-cpu": with_source(cpu_tables.decoding),
    "decode-SmolLM2-135M-cpu": with_source(cpu_tables.trained),
    "autopilot-demo": with_source(autopilot_tables.speeds),
    "autopilot-SmolLM2-135M": with_source(autopilot_tables.speeds),
    "peers-cpu": with_source(cpu_tables.peers),
    "aot": with_source(aot_tables.programs),
    "accelerator-h200": with_source(accelerator_tables.measured),
}


def made(results: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Return the tables of each page by the names of their places; what has not been measured has none."""
    return {
        "README.md": {"headlines": headlines.headlines(results)},
        "benchmarks/README.md": {name: make(results[name]) for name, make in TABLES.items() if name in results},
    }


def place(name: str) -> re.Pattern:
    """Return what finds a table's place: its marker, what stands there, and the end."""
    return re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page, tables in made({file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}).items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        for name, table in tables.items():
            found = place(name).search(text)
            if not found:
                raise SystemExit(f"{page} has no place for the table {name}")
            rewritten = f"{found[1]}{table}\n{found[2]}"
            if rewritten != found[0]:
                stale.append(f"{name} in {page}")
                text = text[: found.start()] + rewritten + text[found.end() :]
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and stale:
        sys.exit(f"not what benchmarks/results say: {', '.join(stale)}; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
