"""Multi-level speculative decoding with quantized drafts (arXiv 2503.13565) in JAX.

import mlspecqd_jax as mlsd
target = mlsd.load("demo")
stack = mlsd.stack(target, (target.quantized(), 5))  # its own weights in MXFP4 draft five tokens a round
out = mlsd.generate(stack, "def fibonacci(n):")
print(out.text[0])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlspecqd_jax.arguments import Arguments
    from mlspecqd_jax.errors import InputError
    from mlspecqd_jax.generation import Generation, Stream, compare, generate, stream
    from mlspecqd_jax.loading.model import Model
    from mlspecqd_jax.loading.models import convert, load
    from mlspecqd_jax.planning import plan
    from mlspecqd_jax.plans import Plan
    from mlspecqd_jax.programs import compiler_options
    from mlspecqd_jax.requests import Batch, prepare
    from mlspecqd_jax.speculation.autopilot import Autopilot
    from mlspecqd_jax.speculation.control import Fixed
    from mlspecqd_jax.speculation.counts import Counts
    from mlspecqd_jax.speculation.level import Level
    from mlspecqd_jax.speculation.loop import advance, buffer_length, finished, generate_tokens, init, step
    from mlspecqd_jax.speculation.protocols import PADDING, Ask, Control, Draft, Drafter, Lent, Scored, Scorer, Sequences
    from mlspecqd_jax.speculation.settings import Sampling
    from mlspecqd_jax.speculation.stack import Stack
    from mlspecqd_jax.speculation.state import State
    from mlspecqd_jax.stacks import prompt_lookup, stack
    from mlspecqd_jax.text.card import Card

__version__ = "0.1.0"

__all__ = [
    "PADDING",
    "Arguments",
    "Ask",
    "Autopilot",
    "Batch",
    "Card",
    "Control",
    "Counts",
    "Draft",
    "Drafter",
    "Fixed",
    "Generation",
    "InputError",
    "Lent",
    "Level",
    "Model",
    "Plan",
    "Sampling",
    "Scored",
    "Scorer",
    "Sequences",
    "Stack",
    "State",
    "Stream",
    "advance",
    "buffer_length",
    "compare",
    "compiler_options",
    "convert",
    "finished",
    "generate",
    "generate_tokens",
    "init",
    "load",
    "plan",
    "prepare",
    "prompt_lookup",
    "stack",
    "step",
    "stream",
]

# Where each name is from; it is imported when it is first used, so that a program that needs little starts soon.
_FROM = {
    "arguments": ("Arguments",),
    "errors": ("InputError",),
    "generation": ("Generation", "Stream", "compare", "generate", "stream"),
    "loading.model": ("Model",),
    "loading.models": ("convert", "load"),
    "planning": ("plan",),
    "plans": ("Plan",),
    "programs": ("compiler_options",),
    "requests": ("Batch", "prepare"),
    "speculation.autopilot": ("Autopilot",),
    "speculation.control": ("Fixed",),
    "speculation.counts": ("Counts",),
    "speculation.level": ("Level",),
    "speculation.loop": ("advance", "buffer_length", "finished", "generate_tokens", "init", "step"),
    "speculation.protocols": ("PADDING", "Ask", "Control", "Draft", "Drafter", "Lent", "Scored", "Scorer", "Sequences"),
    "speculation.settings": ("Sampling",),
    "speculation.stack": ("Stack",),
    "speculation.state": ("State",),
    "stacks": ("prompt_lookup", "stack"),
    "text.card": ("Card",),
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
