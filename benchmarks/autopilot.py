"""Measures drafts of chosen lengths against plain decoding and against drafts of fixed lengths, by the clock, in turn.

    python benchmarks/autopilot.py demo --out benchmarks/results/autopilot-demo.json
    python benchmarks/autopilot.py SmolLM2-135M --prompts mbpp.jsonl gsm8k_test.jsonl tinystories_200.json \\
        --out benchmarks/results/autopilot-SmolLM2-135M.json

All prompts are continued by every stack before the next trial, so that what else the machine does falls on all of them; a trial's
result is a ratio to plain decoding's time in it. Costs are measured first, as `mlspecqd plan` does, and kept in a folder of this
run's own.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import jax
import prompts as prompt_files
from machine import describe, publish, spread

import mlspecqd_jax as mlsd
from mlspecqd_jax import specs
from mlspecqd_jax.planning import encoded, plan_of
from mlspecqd_jax.plans import keep

DEMO_PROMPTS = (
    "def read_file(path):\n",
    "class Stack:\n    def push(self, item):\n",
    "import json\n\ndef load(path):\n",
    "for i in range(",
)
FIXED = (("ngram:4",), ("ngram:8",), ("mxfp4:3",), ("mxfp4:5",), ("int8:5",), ("mxfp4:7", "ngram:3"))
AUTO = (("ngram",), ("mxfp4",), ("int8",))
OFF = " with draft_limit=0"
CHOICES = {"greedy": {}, "T = 0.8": {"temperature": 0.8}}


def stacks_of(model) -> dict[str, mlsd.Stack]:
    """Return plain decoding, stacks of fixed lengths and those that choose them, for which passes are measured and kept."""
    written = [("none",), *FIXED, *AUTO]
    return {" ".join(drafts): specs.stack_of(specs.parse(drafts), model, mlsd.load) for drafts in written}


def planned(model) -> dict[str, dict]:
    """Measure the passes of the stacks that choose lengths, and keep what was found for when they are built; return it."""
    found = {}
    for drafts in AUTO:
        stack = specs.stack_of(specs.parse(drafts), model, mlsd.load)
        began = time.perf_counter()
        plan = plan_of(stack, encoded(model, []))
        seconds = time.perf_counter() - began
        keep(plan)
        times = {
            Path(card.name).name: [round(float(each[n]), 3) for n in (1, 2, 4, 8, 16)]
            for card, each in zip(stack.cards, plan.times, strict=True)
        }
        found[" ".join(drafts)] = {"passes": times, "asking": plan.asking, "plain_seconds": plan.plain, "seconds": seconds}
    return found


def compared(stacks, prompts, new: int, trials: int, batch: int) -> dict:
    """Return, by choice of tokens and stack, the spread of the speed over plain decoding, and what was drafted."""
    groups = [prompts[i : i + batch] for i in range(0, len(prompts) - batch + 1, batch)]
    calls = {name: (stack, {}) for name, stack in stacks.items()}
    calls |= {name + OFF: (stacks[name], {"draft_limit": 0}) for name in ("mxfp4:5", "ngram", "mxfp4")}
    found = {}
    for choice, settings in CHOICES.items():
        ratios, texts, modelled = {name: [] for name in calls}, {}, {}
        for _ in range(trials + 1):  # the first compiles
            seconds = {}
            for name, (stack, more) in calls.items():
                runs = [mlsd.generate(stack, group, max_new_tokens=new, stop_token_ids=(), **settings, **more) for group in groups]
                seconds[name] = sum(run.report["seconds"] for run in runs)
                texts[name] = [run.tokens for run in runs]
                told = [run.report["autopilot"] for run in runs]
                modelled[name] = None if told[0] is None else sum(each["time"] for each in told)
            for name in calls:
                ratios[name].append(seconds["none"] / seconds[name])
        found[choice] = {
            name: {
                "speed": spread(ratios[name][1:]),
                "equal": texts[name] == texts["none"],
                "modelled_speed": None if modelled[name] is None else new * len(groups) / modelled[name],
            }
            for name in calls
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="demo, or a folder in Hugging Face's layout")
    parser.add_argument("--prompts", type=Path, nargs="+", help="files, see prompts.py; the demo has its own")
    parser.add_argument("--number", type=int, default=6, help="of prompts")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    o = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        model = mlsd.load(o.model)
        prompts = list(DEMO_PROMPTS) if o.prompts is None else prompt_files.read(o.prompts, o.number, 40, model.tokenizer)
        costs = planned(model)
        found = compared(stacks_of(model), prompts, o.new, o.trials, o.batch)
    files = "" if o.prompts is None else " --prompts " + " ".join(path.name for path in o.prompts)
    settings = {
        "command": f"python benchmarks/autopilot.py {Path(o.model).name}{files} --trials {o.trials} --batch {o.batch}",
        "device": jax.devices()[0].device_kind,
        "prompts": len(prompts),
        "new": o.new,
        "trials": o.trials,
        "batch": o.batch,
    }
    publish(settings | {"costs": costs, "speeds": found, "took_seconds": time.perf_counter() - began} | describe(), o.out)


if __name__ == "__main__":
    main()
