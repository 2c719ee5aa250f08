"""What the shell command `mlspecqd` takes: its commands, their options, and what each option holds."""

import argparse
import collections
import json
from typing import Any

from mlspecqd_jax.arguments import ARGUMENTS, Argument
from mlspecqd_jax.errors import InputError

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
MESSAGES_HELP = (
    'a conversation in JSON, a list such as [{"role": "user", "content": "Hi"}], or a list of them; - is stdin; implies --chat'
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise InputError(f"{message}; see '{self.prog} --help'")


def parser() -> Parser:
    """Return the parser of all commands; the one that was given is in `command`."""
    made = Parser(prog="mlspecqd", description="Generate text with a Hugging Face model in JAX.", allow_abbrev=False)
    commands = made.add_subparsers(
        dest="command", required=True, metavar="generate | convert | info | plan | sensitivity", parser_class=Parser
    )

    g = commands.add_parser("generate", help="continue prompts", allow_abbrev=False)
    g.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=f"{MODEL_HELP}, demo (default) or demo-small")
    source = g.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="repeat it for a batch")
    source.add_argument("--prompt-file", metavar="F", help=PROMPT_FILE_HELP)
    source.add_argument("--messages", metavar="F", help=MESSAGES_HELP)
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
    g.add_argument("--profile", action="store_true", help="say where the seconds went, from the start of the process on")

    c = commands.add_parser("convert", help="write an orbax checkpoint, which loads faster", allow_abbrev=False)
    c.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, demo or demo-small")
    c.add_argument("out", metavar="OUT", help="a new folder")
    c.add_argument("--dtype", default="bfloat16", metavar="D", help="bfloat16 (default), float32 or float16")
    c.add_argument("--draft", metavar="FORMAT", help="store the weights of the quantized draft too, such as mxfp4 or auto4.5")
    c.add_argument("--calibrate", action="store_true", help=CALIBRATE_HELP)

    i = commands.add_parser("info", help="say whether a model is supported, what it is and what would run it", allow_abbrev=False)
    i.add_argument(
        "model", nargs="?", default="demo", metavar="MODEL", help=f"{MODEL_HELP}, demo (default), demo-small, or a config.json"
    )
    i.add_argument("--json", action="store_true", help="print one JSON object")

    p = commands.add_parser("plan", help="measure what drafts cost and gain here, and keep it", allow_abbrev=False)
    p.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=f"{MODEL_HELP}, demo (default) or demo-small")
    p.add_argument("--draft", action="append", default=[], metavar="SPEC", help="as of generate, without lengths")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="what is asked here; repeat it for several")
    p.add_argument("--dtype", default="bfloat16", metavar="D", help="bfloat16 (default), float32 or float16")
    p.add_argument("--json", action="store_true", help="print one JSON object")

    s = commands.add_parser("sensitivity", help="say what each weight costs in each format", allow_abbrev=False)
    s.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=f"{MODEL_HELP}, demo (default) or demo-small")
    s.add_argument("--dtype", default="bfloat16", metavar="D", help="bfloat16 (default), float32 or float16")
    s.add_argument("--json", action="store_true", help="print one JSON object: by weight and format, nats a token")
    s.add_argument("--plot", metavar="FILE", help="draw layers by kinds of weight too, as .png, .svg or .pdf")
    return made


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
        case "chat_template_kwargs":
            form = {"type": _object, "metavar": "JSON"}
        case "rule":
            form = {"metavar": "R"}
        case _:
            form = {"action": "store_true"}
    return option, form | {"help": words}


def _rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, nor several with commas between them") from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"enable_thinking": false}}')
    return value


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=VALUE, such as 17=-2.5 or 17=-inf") from None


def biases(pairs: list[tuple[int, float]]) -> dict[int, float]:
    """Return the biases by token of --logit-bias, each token once."""
    given = collections.Counter(token for token, _ in pairs)
    twice = next((token for token, n in given.items() if n > 1), None)
    if twice is not None:
        raise InputError(f"--logit-bias names token {twice} more than once; give it one value")
    return dict(pairs)
