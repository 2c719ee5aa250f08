"""The shell command `mlspecqd`: what generate, convert, info, plan and sensitivity do.

Text goes to stdout, everything else to stderr. Exit codes: 0 done; 1 internal error; 2 bad input, with one line that says what to
change; 130 interrupted.
"""

import argparse
import functools
import itertools
import json
import math
import os
import sys
import warnings

from mlspecqd_jax import console, options, prompt_files
from mlspecqd_jax.arguments import ARGUMENTS
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.stopwatch import Stopwatch, since_the_process_began, table

INTERRUPTED = 130


def run() -> None:
    """Leave the process by the exit code of `main`; at once if interrupted, since shutting the runtime down takes its time."""
    code = main()
    if code == INTERRUPTED:
        os._exit(code)  # what was said is flushed
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    console.prepare()
    try:
        arguments = options.parser().parse_args(argv)
        commands = {"generate": _generate, "convert": _convert, "info": _info, "plan": _plan, "sensitivity": _sensitivity}
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # ty: ignore[invalid-assignment]  (ty takes functions for types of their own)
            commands[arguments.command](arguments)
        console.put("")
        return 0
    except InputError as error:
        console.say(f"mlspecqd: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        console.say("\nmlspecqd: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout left, as `| head` does
        console.drop_output()
        return 0


def _show_warning(message, *details, **more):
    console.say(f"mlspecqd: warning: {message}")


def _generate(a: argparse.Namespace) -> None:
    arguments = {name: getattr(a, name) for name in ARGUMENTS if hasattr(a, name)}
    if "logprobs" in arguments and not a.json:
        raise InputError("--logprobs needs --json to print them; add --json")
    prompts = _prompts(a)
    if "logit_bias" in arguments:
        arguments["logit_bias"] = options.biases(arguments["logit_bias"])

    before, watch = since_the_process_began(), Stopwatch()
    from mlspecqd_jax import generation, planner, specs
    from mlspecqd_jax.loading import models

    watch.lap("imports")
    load = functools.cache(functools.partial(models.load, dtype=a.dtype))
    if specs.AUTO in a.draft and len(a.draft) > 1:
        raise InputError("--draft auto chooses all drafts and stands alone; leave the others out")
    a.draft = [] if a.draft == [specs.AUTO] else a.draft
    specs.parse(a.draft, a.calibrate)  # refused before anything is loaded
    target = load(a.model, dequantize=True) if a.dequantize else load(a.model)  # as drafts are: one name is loaded once
    watch.lap("load the model")
    drafts = a.draft or planner.default_drafts(target)
    settings = {"exact": not a.inexact, "share_cache": not a.own_cache}
    stack = specs.stack_of(specs.parse(drafts, a.calibrate), target, load, a.calibrate, **settings)
    watch.lap("drafts: quantize or load")
    if a.json or a.compare or len(prompts) > 1:
        out = (generation.compare if a.compare else generation.generate)(stack, prompts, **arguments)
        watch.lap("programs, prefill and decode")
        _print_profile(a, stack, before, watch)
        if a.json:
            keys = ["text", "tokens", "prompt_tokens", "finish_reason", "report"] + ["logprobs"] * ("logprobs" in arguments)
            console.put(json.dumps({key: _finite(getattr(out, key)) for key in keys}, allow_nan=False) + "\n")
            return
        for prompt, text in zip(prompts, out.text, strict=True):
            _print_prompt(prompt)
            console.put(text + "\n")
    else:
        stream = generation.stream(stack, prompts[0], **arguments)
        watch.lap("programs")
        _print_prompt(prompts[0])
        try:
            for piece in stream:
                console.put(piece)
                watch.lap("decode" if "prefill, to the first text" in watch.spent else "prefill, to the first text")
        finally:
            console.put("\n")
        watch.lap("decode")
        _print_profile(a, stack, before, watch)
        out = stream.generation
        assert out is not None  # since the stream has ended
    _print_summary(out.report)
    if not a.draft:
        drafted = f"drafted with --draft {' --draft '.join(drafts)}" if drafts else "decoded plainly, as its plan says"
        console.say(f"[by default {drafted}{'; --draft none decodes plainly' * bool(drafts)}]")


def _prompts(a: argparse.Namespace) -> list:
    if a.messages is not None:
        return prompt_files.read_conversations(a.messages)
    return a.prompt or prompt_files.read(a.prompt_file)


def _print_prompt(prompt: str | list[dict]) -> None:
    from mlspecqd_jax.text.conversations import conversation

    if isinstance(prompt, list):
        last = conversation(prompt, 0)[-1]
        console.say(f"{last['role']}: {last.get('content') or ''}")
        return
    # On a terminal the text reads on from its prompt; in a pipe stdout carries the new text alone.
    console.say(prompt, end="")


def _print_summary(r: dict) -> None:
    speed = f", {r['tokens_per_second']:.1f} tokens/s" if r["tokens_per_second"] else ""
    ratio = f", {r['speedup']:.2f}x plain decoding" if r["speedup"] else ""
    lines = [
        f"{' < '.join(level['name'] for level in r['levels'])}, {r['dtype']} on {r['device']}: {r['new_tokens']} tokens in "
        f"{r['seconds']:.2f} s{speed}{ratio}; compiled in {r['compile_seconds']:.1f} s"
    ]
    lines += [
        f"{level['name']} accepted {level['accepted']} of {level['drafted']} tokens drafted by {below['name']}, "
        f"{level['mean_acceptance_length']:.2f} tokens a round"
        for level, below in itertools.pairwise(r["levels"])
        if level["rounds"]
    ]
    if r["synthetic_acceptance"]:
        lines.append("synthetic acceptance: coins accepted the drafts, and the text is meaningless")
    console.say("\n".join(f"[{line}]" for line in lines))


def _print_profile(a: argparse.Namespace, stack, before: tuple[float, float], watch: Stopwatch) -> None:
    from mlspecqd_jax.programs import preparing

    if not a.profile:
        return
    rows = {"python, jax": before}
    for name, spent in watch.spent.items():
        rows[name] = spent
        if name.startswith("programs"):
            rows |= {f"  {step}": of_step for step, of_step in preparing(stack).items()}
    console.say(table(rows))


def _finite(value):
    """Return the value with None for each number that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value


def _convert(a: argparse.Namespace) -> None:
    from mlspecqd_jax.loading import models

    folder = models.convert(a.model, a.out, dtype=a.dtype, draft=a.draft, calibrate=a.calibrate)
    console.say(f"wrote {folder}; load it with 'mlspecqd generate {folder}'")


def _info(a: argparse.Namespace) -> None:
    import jax

    from mlspecqd_jax.loading import description
    from mlspecqd_jax.network import ops
    from pallas_kernels import chip_of

    device = jax.devices()[0]
    try:
        found = description.describe(a.model, device.platform)
    except InputError as error:
        if a.json:
            console.put(json.dumps({"supported": False, "model": str(a.model), "why": str(error)}) + "\n")
        raise
    found = {"supported": True} | found
    found["device"] = f"{device.device_kind} ({device.platform}, {jax.device_count()} in all), jax {jax.__version__}"
    found["products"] = ops.implementation(chip_of(device))
    console.put(json.dumps(_finite(found), allow_nan=False) + "\n" if a.json else description.lines(found))


def _plan(a: argparse.Namespace) -> None:
    from mlspecqd_jax import planning, plans, specs
    from mlspecqd_jax.loading import models

    parsed = specs.parse(a.draft)
    if a.draft and specs.lengths(parsed) == "fixed":
        raise InputError(
            f"--draft {' '.join(a.draft)} is not what a plan is of: give drafts without lengths, which it is to choose"
        )
    load = functools.cache(functools.partial(models.load, dtype=a.dtype))
    target = load(a.model)
    _, plan = planning.plan(target, *specs.drafters(parsed, target, load), prompts=a.prompt)
    if a.json:
        console.put(json.dumps(plans.as_json(plan)) + "\n")
        return
    console.put(planning.table(plan) + "\n")
    console.say(f"[kept in {plans.path_of(plan.key)} for the next start]")


def _sensitivity(a: argparse.Namespace) -> None:
    from mlspecqd_jax import sensitivity_table
    from mlspecqd_jax.loading import models

    if a.plot:
        sensitivity_table.check_plot(a.plot)
    found = models.load(a.model, dtype=a.dtype).sensitivity()
    console.put(json.dumps(found) + "\n" if a.json else sensitivity_table.table(found))
    if a.plot:
        sensitivity_table.plot(found, a.plot)
        console.say(f"wrote {a.plot}")


if __name__ == "__main__":
    run()
