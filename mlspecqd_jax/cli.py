"""The shell command `mlspecqd`: generate, convert, info.

Text goes to stdout, everything else to stderr. Exit codes: 0 done; 1 internal error; 2 bad input, with one line that says what to
change; 130 interrupted.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import sys
import warnings

INTERRUPTED = 130
# Options of `generate` that go to the API under their own names.
PASSED_ON = (
    "chat rule max_new_tokens temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty "
    "stop seed logprobs synthetic_acceptance"
)

DRAFT_HELP = (
    "BASE[:LEN], what drafts for the model, repeated for what drafts for the draft; BASE is a format such as mxfp4 (the same "
    "weights in it), MODEL[@FORMAT], ngram, or none (plain decoding); the default is what was found to pay for models of this size "
    "on this device: ngram for small ones, mxfp4 for large ones on CPU"
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise ValueError(f"{message}; see '{self.prog} --help'")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        arguments = _parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except ValueError as error:
        if _is_ours(error):
            print(f"mlspecqd: {error}", file=sys.stderr)
            return 2
        raise
    except KeyboardInterrupt:
        print("\nmlspecqd: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _is_ours(error: ValueError) -> bool:
    """Whether this project raised the error: one of jax's or numpy's is a bug of ours, not bad input."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in ("mlspecqd_jax", "__main__")


def _show_warning(message, *details, **more):
    print(f"mlspecqd: warning: {message}", file=sys.stderr)


def _parser() -> Parser:
    parser = Parser(prog="mlspecqd", description="Generate text with a Hugging Face model in JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate | convert | info", parser_class=Parser)

    g = commands.add_parser("generate", help="continue prompts", allow_abbrev=False)
    g.set_defaults(run=_generate)
    g.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="folder, owner/name id, demo (default) or demo-small")
    source = g.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="repeat it for a batch")
    source.add_argument("--prompt-file", metavar="F", help="a whole file is one prompt, .jsonl one a line, - is stdin")
    g.add_argument("--chat", action="store_true", help="wrap each prompt by the model's chat template")
    g.add_argument("--draft", action="append", default=[], metavar="SPEC", help=DRAFT_HELP)
    g.add_argument("--own-cache", action="store_true", help="give twins a cache of their own instead of their verifier's")
    g.add_argument("--rule", default="coupled", metavar="R", help="coupled (default) or rejection: which noise sampling uses")
    g.add_argument("--inexact", action="store_true", help="do not pad windows: fastest, equal up to rounding")
    g.add_argument("--dtype", default="bfloat16", metavar="D", help="bfloat16 (default), float32 or float16")
    g.add_argument("--max-new-tokens", type=int, metavar="N", help="default 128, or what the positions leave")
    g.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    g.add_argument("--top-k", type=int, default=0, metavar="K")
    g.add_argument("--top-p", type=float, default=1.0, metavar="P")
    g.add_argument("--min-p", type=float, default=0.0, metavar="P")
    g.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    g.add_argument("--presence-penalty", type=float, default=0.0, metavar="P")
    g.add_argument("--frequency-penalty", type=float, default=0.0, metavar="P")
    g.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    g.add_argument("--seed", type=int, default=0, metavar="S", help="prompt r of a batch uses seed S + r")
    g.add_argument("--logprobs", action="store_true", help="with --json: the log-probability of each new token")
    g.add_argument("--synthetic-acceptance", type=_rates, metavar="A[,A2...]", help="benchmark with coins; meaningless text")
    g.add_argument("--compare", action="store_true", help="also decode plainly and report the ratio")
    g.add_argument("--json", action="store_true", help="print one JSON object with text, tokens and report")

    c = commands.add_parser("convert", help="write an orbax checkpoint, which loads faster", allow_abbrev=False)
    c.set_defaults(run=_convert)
    c.add_argument("model", metavar="MODEL", help="folder, owner/name id, demo or demo-small")
    c.add_argument("out", metavar="OUT", help="a new folder")
    c.add_argument("--dtype", default="bfloat16", metavar="D", help="bfloat16 (default), float32 or float16")
    c.add_argument("--draft", metavar="FORMAT", help="store the weights of the quantized draft too, such as mxfp4")

    i = commands.add_parser("info", help="say what a model is and what would run it", allow_abbrev=False)
    i.set_defaults(run=_info)
    i.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="folder, owner/name id, demo (default) or demo-small")
    return parser


def _generate(a: argparse.Namespace) -> None:
    if a.logprobs and not a.json:
        raise ValueError("--logprobs needs --json to print them; add --json")
    prompts = a.prompt or _read_prompts(a.prompt_file)

    from mlspecqd_jax import api, defaults, models, specs, stacks

    load = functools.cache(functools.partial(models.load, dtype=a.dtype))
    specs.parse(a.draft)  # refused before anything is loaded
    target = load(a.model)
    drafts = a.draft or defaults.default_drafts(target)
    stack = stacks.stack(
        target, *specs.drafters(specs.parse(drafts), target, load), exact=not a.inexact, share_cache=not a.own_cache
    )
    arguments = {name: getattr(a, name) for name in PASSED_ON.split()}
    if a.json or a.compare or len(prompts) > 1:
        generation = (api.compare if a.compare else api.generate)(stack, prompts, **arguments)
        if a.json:
            keys = ["text", "tokens", "prompt_tokens", "finish_reason", "report"] + ["logprobs"] * a.logprobs
            print(json.dumps({key: getattr(generation, key) for key in keys}))
            return
        for prompt, text in zip(prompts, generation.text, strict=True):
            _print_prompt(prompt)
            print(text)
    else:
        stream = api.stream(stack, prompts[0], **arguments)
        _print_prompt(prompts[0])
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        generation = stream.generation
    _print_summary(generation.report)
    if not a.draft:
        print(f"[by default drafted with --draft {' --draft '.join(drafts)}; --draft none decodes plainly]", file=sys.stderr)


def _print_prompt(prompt: str) -> None:
    # On a terminal the text reads on from its prompt; in a pipe stdout carries the new text alone.
    print(prompt, end="", file=sys.stderr, flush=True)


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
    print("\n".join(f"[{line}]" for line in lines), file=sys.stderr)


def _rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def _read_prompts(name: str) -> list[str]:
    try:
        text = sys.stdin.read() if name == "-" else pathlib.Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {name} is not UTF-8 text ({error.reason}); convert it first") from error
    except OSError as error:
        raise ValueError(f"--prompt-file {name} cannot be read ({error.strerror}); check the path") from error
    if not name.endswith(".jsonl"):
        return [text]
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            value = value.get("prompt") if isinstance(value, dict) else value
            if not isinstance(value, str):
                raise ValueError(f'--prompt-file {name}, line {number}: needs a JSON string or an object with a "prompt" string')
            prompts.append(value)
    if not prompts:
        raise ValueError(f"--prompt-file {name} holds no prompt; give at least one line")
    return prompts


def _convert(a: argparse.Namespace) -> None:
    from mlspecqd_jax import models

    folder = models.convert(a.model, a.out, dtype=a.dtype, draft=a.draft)
    print(f"wrote {folder}; load it with 'mlspecqd generate {folder}'", file=sys.stderr)


def _info(a: argparse.Namespace) -> None:
    import jax

    from mlspecqd_jax import matmul, models
    from pallas_kernels import chip_of

    device = jax.devices()[0]
    for name, value in (
        models.describe(a.model)
        | {
            "device": f"{device.device_kind} ({device.platform}, {jax.device_count()} in all), jax {jax.__version__}",
            "products": matmul.implementation(chip_of(device)),
        }
    ).items():
        print(f"{name + ':':22}{value}")


if __name__ == "__main__":
    sys.exit(main())
