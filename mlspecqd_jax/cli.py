"""The shell command `mlspecqd`: generate, convert, info, plan, sensitivity.

Text goes to stdout, everything else to stderr. Exit codes: 0 done; 1 internal error; 2 bad input, with one line that says what to
change; 130 interrupted.
"""

import argparse
import collections
import functools
import itertools
import json
import math
import os
import sys
import warnings
from typing import Any

from mlspecqd_jax import console, prompt_files
from mlspecqd_jax.arguments import ARGUMENTS, Argument
from mlspecqd_jax.errors import InputError

INTERRUPTED = 130
MODEL_HELP = "folder, .gguf file, owner/name or owner/name/FILE.gguf id"
DRAFT_HELP = (
    "BASE[:LEN], what drafts for the model, repeated for what drafts for the draft; BASE is a format such as mxfp4 (the same "
    "weights in it; auto4.5: a format for each weight, 4.5 bits on average), MODEL[@FORMAT] (one that is quantized already drafts "
    "as it is stored), ngram, or none (plain decoding); LEN tokens a round, or without any LEN as many as pay; the default, auto, "
    "is what was found to pay for models of this size on this device: ngram for small ones, mxfp4 for large ones on CPU"
)
CALIBRATE_HELP = (
    "round the weights of twins in a format so that they make up for each other's errors, on text that the model writes: better "
    "drafts of the same size, made once and kept"
)
PROMPT_FILE_HELP = (
    "UTF-8 text, - is stdin; a file is one prompt (one newline at its end is dropped), a .jsonl file holds one a line"
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise InputError(f"{message}; see '{self.prog} --help'")


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
        arguments = _parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # ty: ignore[invalid-assignment]  (ty takes functions for types of their own)
            arguments.run(arguments)
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


def _parser() -> Parser:
    parser = Parser(prog="mlspecqd", description="Generate text with a Hugging Face model in JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="generate | convert | info | plan | sensitivity", parser_class=Parser
    )

    g = commands.add_parser("generate", help="continue prompts", allow_abbrev=False)
    g.set_defaults(run=_generate)
    g.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=f"{MODEL_HELP}, demo (default) or demo-small")
    source = g.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="repeat it for a batch")
    source.add_argument("--prompt-file", metavar="F", help=PROMPT_FILE_HELP)
    g.add_argument("--draft", action="append", default=[], metavar="SPEC", help=DRAFT_HELP)
    g.add_argument("--calibrate", action="store_true", help=CALIBRATE_HELP)
    g.add_argument("--own-cache", action="store_true", help="give twins a cache of their own instead of their verifier's")
    g.add_argument("--inexact", action="store_true", help="do not pad windows: fastest, equal up to rounding")
    g.add_argument("--dtype", default="bfloat16", metavar="D", help="bfloat16 (default), float32 or float16")
    g.add_argument("--dequantize", action="store_true", help="decode the weights of a MODEL that is quantized already")
    for name, argument in ARGUMENTS.items():
        option, form = _spelt(name, argument)
        g.add_argument(option, dest=name, default=argparse.SUPPRESS, **form)
    g.add_argument("--compare", action="store_true", help="also decode plainly and report the ratio")
    g.add_argument("--json", action="store_true", help="print one JSON object with text, tokens and report")

    c = commands.add_parser("convert", help="write an orbax checkpoint, which loads faster", allow_abbrev=False)
    c.set_defaults(run=_convert)
    c.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, demo or demo-small")
    c.add_argument("out", metavar="OUT", help="a new folder")
    c.add_argument("--dtype", default="bfloat16", metavar="D", help="bfloat16 (default), float32 or float16")
    c.add_argument("--draft", metavar="FORMAT", help="store the weights of the quantized draft too, such as mxfp4 or auto4.5")
    c.add_argument("--calibrate", action="store_true", help=CALIBRATE_HELP)

    i = commands.add_parser("info", help="say what a model is and what would run it", allow_abbrev=False)
    i.set_defaults(run=_info)
    i.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=f"{MODEL_HELP}, demo (default) or demo-small")

    p = commands.add_parser("plan", help="measure what drafts cost and gain here, and keep it", allow_abbrev=False)
    p.set_defaults(run=_plan)
    p.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=f"{MODEL_HELP}, demo (default) or demo-small")
    p.add_argument("--draft", action="append", default=[], metavar="SPEC", help="as of generate, without lengths")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="what is asked here; repeat it for several")
    p.add_argument("--dtype", default="bfloat16", metavar="D", help="bfloat16 (default), float32 or float16")
    p.add_argument("--json", action="store_true", help="print one JSON object")

    s = commands.add_parser("sensitivity", help="say what each weight costs in each format", allow_abbrev=False)
    s.set_defaults(run=_sensitivity)
    s.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=f"{MODEL_HELP}, demo (default) or demo-small")
    s.add_argument("--dtype", default="bfloat16", metavar="D", help="bfloat16 (default), float32 or float16")
    s.add_argument("--json", action="store_true", help="print one JSON object: by weight and format, nats a token")
    s.add_argument("--plot", metavar="FILE", help="draw layers by kinds of weight too, as .png, .svg or .pdf")
    return parser


def _spelt(name: str, argument: Argument) -> tuple[str, dict[str, Any]]:
    """Return an argument's option on the command line, and what it takes there."""
    option, words, kind = "--" + name.replace("_", "-"), argument.words, argument.number
    if argument.letter and kind:
        form = {"type": int if kind.whole else float, "metavar": argument.letter}
        return option, form | {"help": f"{kind.needed}; {words}"}
    match name:
        case "stop":
            form = {"action": "append", "metavar": "TEXT"}
        case "stop_token_ids":
            option, form = "--stop-token-id", {"action": "append", "type": int, "metavar": "ID"}
        case "logit_bias":
            form = {"action": "append", "type": _bias, "metavar": "ID=VALUE"}
        case "synthetic_acceptance":
            form = {"type": _rates, "metavar": "A[,A2...]"}
        case "rule":
            form = {"metavar": "R"}
        case _:
            form = {"action": "store_true"}
    return option, form | {"help": words}


def _generate(a: argparse.Namespace) -> None:
    arguments = {name: getattr(a, name) for name in ARGUMENTS if hasattr(a, name)}
    if "logprobs" in arguments and not a.json:
        raise InputError("--logprobs needs --json to print them; add --json")
    prompts = a.prompt or prompt_files.read(a.prompt_file)
    if "logit_bias" in arguments:
        arguments["logit_bias"] = _biases(arguments["logit_bias"])

    from mlspecqd_jax import generation, planner, specs
    from mlspecqd_jax.loading import models

    load = functools.cache(functools.partial(models.load, dtype=a.dtype))
    if specs.AUTO in a.draft and len(a.draft) > 1:
        raise InputError("--draft auto chooses all drafts and stands alone; leave the others out")
    a.draft = [] if a.draft == [specs.AUTO] else a.draft
    specs.parse(a.draft, a.calibrate)  # refused before anything is loaded
    target = load(a.model, dequantize=True) if a.dequantize else load(a.model)  # as drafts are: one name is loaded once
    drafts = a.draft or planner.default_drafts(target)
    options = {"exact": not a.inexact, "share_cache": not a.own_cache}
    stack = specs.stack_of(specs.parse(drafts, a.calibrate), target, load, a.calibrate, **options)
    if a.json or a.compare or len(prompts) > 1:
        out = (generation.compare if a.compare else generation.generate)(stack, prompts, **arguments)
        if a.json:
            keys = ["text", "tokens", "prompt_tokens", "finish_reason", "report"] + ["logprobs"] * ("logprobs" in arguments)
            console.put(json.dumps({key: _finite(getattr(out, key)) for key in keys}, allow_nan=False) + "\n")
            return
        for prompt, text in zip(prompts, out.text, strict=True):
            _print_prompt(prompt)
            console.put(text + "\n")
    else:
        stream = generation.stream(stack, prompts[0], **arguments)
        _print_prompt(prompts[0])
        try:
            for piece in stream:
                console.put(piece)
        finally:
            console.put("\n")
        out = stream.generation
        assert out is not None  # since the stream has ended
    _print_summary(out.report)
    if not a.draft:
        drafted = f"drafted with --draft {' --draft '.join(drafts)}" if drafts else "decoded plainly, as its plan says"
        console.say(f"[by default {drafted}{'; --draft none decodes plainly' * bool(drafts)}]")


def _print_prompt(prompt: str) -> None:
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


def _finite(value):
    """Return the value with None for each number that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value


def _rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, nor several with commas between them") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=VALUE, such as 17=-2.5 or 17=-inf") from None


def _biases(pairs: list[tuple[int, float]]) -> dict[int, float]:
    given = collections.Counter(token for token, _ in pairs)
    twice = next((token for token, n in given.items() if n > 1), None)
    if twice is not None:
        raise InputError(f"--logit-bias names token {twice} more than once; give it one value")
    return dict(pairs)


def _convert(a: argparse.Namespace) -> None:
    from mlspecqd_jax.loading import models

    folder = models.convert(a.model, a.out, dtype=a.dtype, draft=a.draft, calibrate=a.calibrate)
    console.say(f"wrote {folder}; load it with 'mlspecqd generate {folder}'")


def _info(a: argparse.Namespace) -> None:
    import jax

    from mlspecqd_jax.loading import models
    from mlspecqd_jax.network import ops
    from pallas_kernels import chip_of

    device = jax.devices()[0]
    for name, value in (
        models.describe(a.model)
        | {
            "device": f"{device.device_kind} ({device.platform}, {jax.device_count()} in all), jax {jax.__version__}",
            "products": ops.implementation(chip_of(device)),
        }
    ).items():
        console.put(f"{name + ':':22}{value}\n")


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
