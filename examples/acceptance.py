"""Shows which drafts a model accepts: token acceptance by position and temperature, and tokens a round, predicted and measured.

    python examples/acceptance.py
    python examples/acceptance.py --prompts HumanEval.jsonl.gz --number 50 --plot humaneval
    python examples/acceptance.py --model Qwen/Qwen3-1.7B --small Qwen/Qwen3-0.6B

Prompts are function heads that `examples/prompts.jsonl` holds, written for this project in the form of HumanEval's. All go through
in one batch. Counts, not times: the result does not depend on how busy the machine is, and another run gives the same.
"""

import argparse
import functools
import gzip
import importlib.util
import json
import math
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jax

import mlspecqd_jax as mlsd
from mlspecqd_jax import specs
from mlspecqd_jax.speculation.theory import match_rate, rounds_for

PROMPTS = Path(__file__).resolve().parent / "prompts.jsonl"
OUTER, INNER = 6, 3  # draft_len


def stacks_of(small: str | None) -> dict[str, list[str]]:
    """Return what is measured: label -> drafters as `mlspecqd generate --draft` takes them, outermost first."""
    alone = {"mxfp8_e4m3": "mxfp8_e4m3", "mxfp6_e2m3": "mxfp6_e2m3", "mxfp4": "mxfp4", "ngram": "ngram"}
    if small:
        alone |= {"small": small, "small@mxfp4": f"{small}@mxfp4"}
    found = {label: [f"{spec}:{OUTER}"] for label, spec in alone.items()}
    for label in ("ngram", "small@mxfp4"):
        if label in alone:
            found[f"mxfp4, {label}"] = [f"mxfp4:{OUTER}", f"{alone[label]}:{INNER}"]
    return found


def measure(model, small: str | None, prompts: list[str], options: argparse.Namespace, load) -> Iterator[dict]:
    """Yield a row for each stack, temperature and level that judges a draft: what it accepts, and how well theory knew."""
    arguments = {"max_new_tokens": options.new_tokens}
    for label, written in stacks_of(small).items():
        stack = specs.stack_of(specs.parse(written), model, load)
        for temperature in options.temperatures:
            report = mlsd.generate(stack, prompts, temperature=temperature, **arguments).report
            yield from (
                {"stack": label, "temperature": temperature, "judge": i} | of_level(report, i)
                for i, level in enumerate(report["levels"])
                if level["judged"]
            )


def of_level(report: dict, i: int) -> dict:
    """Return acceptance of the draft that level i judges, and tokens a round of it.

    Rounds of the outermost level give the text, those of a level below the drafts for the level above. The prediction takes
    acceptance to depend on the position in the draft alone, and look-up to find a match equally often everywhere.
    """
    level, drafter = report["levels"][i : i + 2]
    acceptance = [rate or 0.0 for rate in level["acceptance_by_position"]]
    if i == 0:
        wanted = [request["new_tokens"] for request in report["requests"]]
        measured = sum(wanted) / level["rounds"]
    else:
        above = report["levels"][i - 1]
        wanted = [above["draft_len"]]
        measured = above["drafted"] / level["rounds"]
    match = 1.0
    if not drafter["passes"]:  # look-up, while a model drafts whenever a draft is of use
        match = match_rate(level["judged_by_position"][0] / level["rounds"], acceptance, round(sum(wanted) / len(wanted)))
    return {
        "verifier": level["name"],
        "draft": drafter["name"],
        "draft_len": level["draft_len"],
        "rounds": level["rounds"],
        "judged_by_position": level["judged_by_position"],
        "token_acceptance": level["token_acceptance"],
        "acceptance_by_position": level["acceptance_by_position"],
        "tokens_per_round": measured,
        "predicted_tokens_per_round": sum(wanted) / sum(rounds_for(n, acceptance, match) for n in wanted),
    }


def table(rows: list[dict]) -> str:
    """Return the rows as text in columns."""
    lines = [("stack", "T", "judged by", "accepted", "tokens a round", "predicted", "accepted by position")]
    for row in rows:
        positions = ["  - " if a is None else f"{a:.2f}" for a in row["acceptance_by_position"]]
        lines.append(
            (
                row["stack"],
                f"{row['temperature']:g}",
                row["verifier"],
                f"{row['token_acceptance']:.3f}",
                f"{row['tokens_per_round']:.2f}",
                f"{row['predicted_tokens_per_round']:.2f}",
                " ".join(positions),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def described(options: argparse.Namespace, prompts: int) -> dict:
    """Return what the rows were measured with."""
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in ("jax", "flax", "transformers")}
    return {
        "command": "python examples/acceptance.py",
        "model": options.model,
        "prompts": prompts,
        "new_tokens": options.new_tokens,
        "dtype": options.dtype,
        "device": jax.devices()[0].device_kind,
        "versions": versions,
    }


def read_prompts(path: Path, number: int | None) -> list[str]:
    """Return the first texts of a .jsonl file, gzipped or not, whose lines are objects with a "prompt"."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            prompts = [json.loads(line)["prompt"] for line in file if line.strip()]
    except OSError as error:
        raise ValueError(f"--prompts {path} cannot be read ({error.strerror or error}); check the path") from error
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f'--prompts {path} needs one JSON object with a "prompt" a line; convert it first') from error
    if not all(isinstance(prompt, str) and prompt for prompt in prompts) or not prompts:
        raise ValueError(f"--prompts {path} holds no prompt, or an empty one; give at least one text")
    return prompts[:number]


class Parser(argparse.ArgumentParser):
    """Answers a bad argument with one sentence, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line and refuse what cannot work, before anything is computed."""
    parser = Parser("acceptance", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help="a folder, an owner/name id, or a demo")
    add("--small", help="a smaller model of the same tokenizer; else demo-small where the model is demo, and none elsewhere")
    add("--prompts", type=Path, default=PROMPTS, help='.jsonl or .jsonl.gz, one object with a "prompt" a line')
    add("--number", type=int, help="of prompts; else all")
    add("--new-tokens", type=int, default=64, help="after each prompt")
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0], metavar="T", help="0 is greedy")
    add("--dtype", default="bfloat16", help="bfloat16, float32 or float16")
    add("--plot", type=Path, default=Path("acceptance"), help="where the plot goes, as .png and .svg")
    add("--no-plot", action="store_true", help="print the table alone")
    add("--json", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    if options.small is None and options.model == "demo":
        options.small = "demo-small"
    if not options.no_plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib; pip install '.[plot]', or give --no-plot.")
    for option, path in {"--json": options.json, "--plot": None if options.no_plot else options.plot}.items():
        if path is not None and not path.parent.is_dir():
            parser.error(f"{option} {path}: {path.parent} is not a folder.")
    for option, value in {"--number": options.number, "--new-tokens": options.new_tokens}.items():
        if value is not None and value < 1:
            parser.error(f"{option} is {value}; it must be at least 1.")
    if not all(0 <= temperature < math.inf for temperature in options.temperatures):
        parser.error(f"--temperatures are {options.temperatures}; none may be negative.")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print, plot; return the exit code."""
    options = parse(argv)
    load = functools.cache(functools.partial(mlsd.load, dtype=options.dtype))
    try:
        prompts = read_prompts(options.prompts, options.number)
        model, *small = [load(name) for name in (options.model, options.small) if name]
        mlsd.prepare(mlsd.stack(model, *small), prompts, max_new_tokens=options.new_tokens)
    except ValueError as error:
        print(f"acceptance: {error}", file=sys.stderr)
        return 2
    rows = []
    for row in measure(model, options.small, prompts, options, load):
        rows.append(row)
        accepted = f"accepts {row['token_acceptance']:.3f} of {row['draft']}"
        print(f"{row['stack']} at {row['temperature']:g}: {row['verifier']} {accepted}", file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(described(options, len(prompts)) | {"rows": rows}, indent=1) + "\n")
    if not options.no_plot:
        from acceptance_plot import draw

        what = f"{len(prompts)} prompts, {options.new_tokens} new tokens each, {options.dtype}"
        title = f"{options.model}: token acceptance of its drafts over {what}"
        for path in draw(rows, title, options.plot):
            print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
