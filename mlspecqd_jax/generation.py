"""`generate` and `stream`: text in, text out, over the pure functions of `speculation`."""

import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Unpack

import jax
import numpy as np

from mlspecqd_jax import jax_settings, plans, report
from mlspecqd_jax.arguments import LARGEST_INT, Arguments, is_array
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.programs import programs
from mlspecqd_jax.requests import Batch, Request, request
from mlspecqd_jax.speculation.autopilot import Autopilot
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.loop import piece_width
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.stack import Stack
from mlspecqd_jax.speculation.state import State, counts_of
from mlspecqd_jax.text.conversations import is_conversation
from mlspecqd_jax.text.detokenizer import Detokenizer

ROUNDS_TO_STOP_STRINGS = 16  # rounds between looks at the text when stop strings are given
SLICE_SECONDS = 0.2  # of work in one call, after which an interrupt is heeded
GROWTH = 4  # of a call's work from one to the next: the first say little of what later ones take, and each takes time of its own


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns, one entry a prompt."""

    text: list[str]  # without the prompt, special tokens and stop string
    tokens: list[list[int]]  # new ids, the EOS included
    prompt_tokens: list[list[int]]
    finish_reason: list[str]  # "stop" (an EOS id or a stop string) or "length"
    logprobs: list[list[float]] | None  # of each new token under the model's own, unadjusted logits
    report: dict[str, Any]


def generate(stack: Stack, prompts, **arguments: Unpack[Arguments]) -> Generation:
    """Continue one or several prompts.

    Args:
      stack: from `stack`.
      prompts: as for `prepare`.
      **arguments: any of `Arguments`.

    An interrupt (Ctrl-C) is heeded after at most some SLICE_SECONDS of work, one pass of the model, or a compilation.

    Raises:
      InputError: before anything is compiled, one sentence on what is wrong; or as soon as the model's logits for a row are no
        numbers, which dtype to load it in.
    """
    run = _run(stack, prompts, LARGEST_INT if arguments.get("stop") is None else ROUNDS_TO_STOP_STRINGS, arguments)
    while True:
        try:
            next(run)
        except StopIteration as finished:
            return finished.value


class Stream:
    """Iterates over the text of one continuation as it comes; afterwards `generation` holds what `generate` would return."""

    def __init__(self, run):
        self._run = run
        self.generation: Generation | None = None

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                pieces = next(self._run)
            except StopIteration as finished:
                self.generation = finished.value
                return
            if pieces[0]:
                yield pieces[0]


def stream(stack: Stack, prompt, **arguments: Unpack[Arguments]) -> Stream:
    """Continue one prompt and iterate over its text piece by piece, round by round; the arguments are those of `generate`.

    A piece never ends within a character, nor within what may become a stop string.

    Raises:
      InputError: as `generate`, or more than one prompt is given.
    """
    several = (isinstance(prompt, (list, tuple)) and not is_conversation(prompt)) or (is_array(prompt) and prompt.ndim)
    if several and len(prompt) != 1:
        raise InputError(f"stream continues one prompt, but {len(prompt)} were given; call generate for several")
    run = _run(stack, prompt, 1, arguments)
    next(run)  # check the arguments and compile now rather than at the first piece
    return Stream(run)


def compare(stack: Stack, prompts, **arguments: Unpack[Arguments]) -> Generation:
    """Generate, then decode the same prompts plainly in the fastest form (inexact), and put the ratio of times into the report."""
    ours = generate(stack, prompts, **arguments)
    arguments.pop("synthetic_acceptance", None)
    plain = Stack(Level(stack.level.model, stack.level.params), stack.cards[:1], exact=False)
    baseline = generate(plain, prompts, **arguments)
    per_token = [g.report["seconds"] / max(g.report["new_tokens"], 1) for g in (baseline, ours)]
    return dataclasses.replace(ours, report=ours.report | {"speedup": per_token[0] / per_token[1]})


def _run(stack: Stack, prompts, most_rounds: int, arguments: Mapping[str, Any]):
    """Check, compile, then yield the new text of each row after every slice of at most so many rounds; return the Generation.

    The first yield comes before anything is generated.
    """
    asked = request(stack, prompts, dict(arguments))
    batch, sampling, _, stops = asked
    state, compile_seconds = compiled(stack, asked)
    rows, begin, limit = range(len(batch.length)), np.asarray(batch.length), np.array(batch.limit)
    prompt_tokens = [np.asarray(batch.tokens)[r, : begin[r]].tolist() for r in rows]
    yield [""] * len(rows)

    began = time.perf_counter()
    state = prefilled(stack, state, batch)
    prefill_seconds, round_seconds = time.perf_counter() - began, 0.0
    decoders = [Detokenizer(stack.card.tokenizer, prompt, stops) if stack.card.tokenizer else None for prompt in prompt_tokens]
    length, rounds = begin, _first(prefill_seconds, most_rounds) if begin.max() > 1 else 1
    while True:
        seen, sliced = length, time.perf_counter()
        state, (tokens, length, ended, broken) = _slice(stack, state, limit, sampling, rounds)
        elapsed = time.perf_counter() - sliced
        round_seconds, rounds = round_seconds + elapsed, _next(rounds, elapsed, most_rounds)
        pieces = [d.push(tokens[r, seen[r] : length[r]].tolist()) if d else "" for r, d in enumerate(decoders)]
        stopped = np.array([d is not None and d.stopped for d in decoders])
        limit = np.where(stopped, length, limit)
        done = ended | broken | (length >= limit)
        yield [piece + d.finish() if d and over else piece for piece, d, over in zip(pieces, decoders, done, strict=True)]
        if np.any(broken & ~stopped):
            raise InputError(_broken_sentence(stack, int(np.argmax(broken & ~stopped)), length - begin))
        if done.all():
            break
    timing = report.Timing(time.perf_counter() - began, prefill_seconds, round_seconds, compile_seconds)
    stopped = [d is not None and d.stopped for d in decoders]  # what `finish` gave may have completed a stop string
    new = [tokens[r, begin[r] : length[r]].tolist() for r in rows]
    new = [ids[: d.tokens] if d and over else ids for ids, d, over in zip(new, decoders, stopped, strict=True)]
    logprobs = None
    if state.logprobs is not None:
        logprobs = [np.asarray(state.logprobs)[r, begin[r] : begin[r] + len(new[r])].tolist() for r in rows]
    if isinstance(state.control, Autopilot) and state.control.is_measured:
        plans.learn(stack.level, counts_of(state), timing.round_seconds)
    summary = report.build(stack, state, sampling, [len(ids) for ids in new], timing)
    for sentence in report.warnings_of(summary):
        warnings.warn(sentence, stacklevel=3)
    return Generation(
        text=[d.text if d else "" for d in decoders],
        tokens=new,
        prompt_tokens=prompt_tokens,
        finish_reason=["stop" if ended[r] or stopped[r] else "length" for r in rows],
        logprobs=logprobs,
        report=summary,
    )


@jax_settings.held
def compiled(stack: Stack, asked: Request) -> tuple[State, float]:
    """Compile by calls that have nothing to do; return the state in which nothing is fed yet, and the seconds it took."""
    began = time.perf_counter()
    run, (batch, sampling, control, _) = programs(stack), asked
    state = run.begin(stack, batch.tokens, batch.length, sampling, control=control)
    state = run.feed(stack, state, prefill_width=batch.prefill_width, first=np.int32(0), pieces=np.int32(0))
    state = run.advance(stack, state, np.array(batch.limit), sampling, np.int32(0))
    return jax.block_until_ready(state), time.perf_counter() - began


@jax_settings.held
def prefilled(stack: Stack, state: State, batch: Batch) -> State:
    """Feed the prompts, some pieces a call."""
    width = piece_width(batch.prefill_width, batch.tokens.shape[1])
    total = -(-(int(np.asarray(batch.length).max()) - 1) // width)
    first, pieces, feed = 0, 1, programs(stack).feed
    while first < total:
        began = time.perf_counter()
        state = feed(stack, state, prefill_width=batch.prefill_width, first=np.int32(first), pieces=np.int32(pieces))
        jax.block_until_ready(state.cache)
        first, pieces = first + pieces, _next(pieces, time.perf_counter() - began, total)
    return state


@jax_settings.held
def _slice(stack: Stack, state: State, limit: np.ndarray, sampling: Sampling, rounds: int):
    """Run some rounds; return the state, and what the host looks at of it: tokens, length, ended, broken."""
    state = programs(stack).advance(stack, state, limit, sampling, np.int32(rounds))
    return state, jax.device_get((state.tokens, state.length, state.ended, state.broken))


def _first(seconds: float, most: int) -> int:
    """Return how many rounds to begin with where prompts were fed in `seconds`: a pass takes no longer, nor do most drafts."""
    return max(1, min(int(SLICE_SECONDS / max(2 * seconds, 1e-9)), most))


def _next(n: int, seconds: float, most: int) -> int:
    """Return how many rounds or pieces take about SLICE_SECONDS if n took so long, but at most GROWTH times as many as those."""
    return max(1, min(int(n * SLICE_SECONDS / max(seconds, 1e-9)), GROWTH * n, most))


def _broken_sentence(stack: Stack, row: int, new_tokens: np.ndarray) -> str:
    """Say why a row cannot go on: it names the row, and what to change."""
    dtype = report.dtype_of(stack)
    cause = (
        'the model\'s values are too large for float16; load it with dtype "bfloat16"'
        if dtype == "float16"
        else f"its weights are broken, or a penalty is far too large ({dtype} holds what a sound model computes); load it anew"
    )
    return f"row {row}: after {new_tokens[row]} new tokens {stack.card.name} gives logits that are no finite numbers: {cause}"
