"""`generate` and `stream`: text in, text out, over the pure functions of `speculation`."""

import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from mlspecqd_jax import report, speculation
from mlspecqd_jax.levels import Level
from mlspecqd_jax.sampling import Sampling
from mlspecqd_jax.speculation import State
from mlspecqd_jax.text import Decoder, encode

DEFAULT_NEW_TOKENS = 128
PREFILL_WIDTHS = (16, 64, speculation.PREFILL_WIDTH)
ROUNDS_TO_STOP_STRINGS = 16  # rounds between looks at the text when stop strings are given
ALL_ROUNDS = 2**31 - 1

_init = jax.jit(speculation.init, static_argnames="prefill_width")
_advance = jax.jit(speculation.advance, donate_argnames="state")


class Arguments(TypedDict, total=False):
    """What may be asked of a generation; anything else is refused by name. A list gives one value a row."""

    max_new_tokens: int | Sequence[int] | None  # None (default): 128, or what the positions leave
    chat: bool  # wrap each text as a user's message by the tokenizer's chat template; default False
    temperature: float | Sequence[float]  # default 0: greedy
    top_k: int | Sequence[int]  # default 0: off
    top_p: float | Sequence[float]  # default 1: off
    min_p: float | Sequence[float]  # default 0: off
    seed: int | Sequence[int]  # default 0; an int s means s, s + 1, ... for rows 0, 1, ...
    draft_limit: int | Sequence[int]  # drafted tokens a round for the target, at most; default the stack's draft_len; 0: plain
    rule: str  # "coupled" (default) or "rejection"
    repetition_penalty: float | Sequence[float]  # default 1: off
    presence_penalty: float | Sequence[float]  # default 0: off
    frequency_penalty: float | Sequence[float]  # default 0: off
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None  # token id to what is added to its logit
    stop_token_ids: Sequence[int] | None  # ids that end a row; None (default): the model's own
    stop: str | Sequence[str] | None  # text ends before the first of these that is completed
    logprobs: bool  # record the log-probability of each new token under the model's own logits; default False
    synthetic_acceptance: Sequence[float] | None  # for benchmarks: coins accept drafts, one rate a level; meaningless output


class Batch(NamedTuple):
    """Prompts as the pure functions take them."""

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]
    limit: jax.Array  # int32 [B], final lengths
    prefill_width: int  # static


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns, one entry a prompt."""

    text: list[str]  # without the prompt, special tokens and stop string
    tokens: list[list[int]]  # new ids, the EOS included
    prompt_tokens: list[list[int]]
    finish_reason: list[str]  # "stop" (an EOS id or a stop string) or "length"
    logprobs: list[list[float]] | None  # of each new token under the model's own, unadjusted logits
    report: dict[str, Any]


def prepare(stack: Level, prompts, *, max_new_tokens: int | Sequence[int] | None = None, chat: bool = False) -> Batch:
    """Encode prompts and lay them out in a buffer whose size is a bucket, so that another prompt is rarely another trace.

    Args:
      stack: from `stack`.
      prompts: a text, a list of texts, or a list of token id lists.
      max_new_tokens: at most this many new tokens, one number or one a row; None is 128, or what the positions leave.
      chat: wrap each text as a user's message by the tokenizer's chat template.

    Raises:
      ValueError: a prompt is empty, or prompt and new tokens exceed the positions of the target or of a draft.
    """
    card = stack.card
    rows = encode(card, prompts, chat=chat)
    explicit = max_new_tokens is not None
    wanted = np.asarray(max_new_tokens if explicit else DEFAULT_NEW_TOKENS)
    if wanted.dtype.kind not in "iu" or wanted.ndim > 1 or np.any(wanted < 1):
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}, but must be a positive whole number (or one a row)")
    if wanted.ndim == 1 and len(wanted) != len(rows):
        raise ValueError(f"max_new_tokens has {len(wanted)} entries for {len(rows)} prompts; give a number or one for each")
    length = np.array([len(row) for row in rows])
    if np.any(length >= card.max_positions):
        raise ValueError(
            f"a prompt has {max(length)} tokens, but {card.name} has {card.max_positions} positions and needs one for a new token; "
            "shorten the prompt"
        )
    limit = length + wanted
    if explicit and np.any(limit > card.max_positions):
        worst = np.argmax(limit)
        raise ValueError(
            f"{length[worst]} prompt tokens and {limit[worst] - length[worst]} new tokens exceed the {card.max_positions} "
            f"positions of {card.name}; lower max_new_tokens or shorten the prompt"
        )
    limit = np.minimum(limit, card.max_positions)
    for draft in (level.card for level in stack.levels[1:]):
        if limit.max() > draft.max_positions:
            raise ValueError(
                f"{draft.name} has {draft.max_positions} positions, but prompt and new tokens take {limit.max()}; "
                "lower max_new_tokens or draft with a model of more positions"
            )
    tokens = np.zeros((len(rows), speculation.buffer_length(int(limit.max()))), np.int32)
    for r, row in enumerate(rows):
        tokens[r, : len(row)] = row
    width = next((w for w in PREFILL_WIDTHS if w >= length.max() - 1), PREFILL_WIDTHS[-1])
    return Batch(jnp.asarray(tokens), jnp.asarray(length, jnp.int32), jnp.asarray(limit, jnp.int32), width)


def generate(stack: Level, prompts, **arguments: Unpack[Arguments]) -> Generation:
    """Continue one or several prompts.

    Args:
      stack: from `stack`.
      prompts: a text, a list of texts, or a list of token id lists.
      **arguments: any of `Arguments`.

    Raises:
      ValueError: before anything is compiled, one sentence on what is wrong.
    """
    rounds = ROUNDS_TO_STOP_STRINGS if arguments.get("stop") else ALL_ROUNDS
    run = _run(stack, prompts, rounds, arguments)
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


def stream(stack: Level, prompt, **arguments: Unpack[Arguments]) -> Stream:
    """Continue one prompt and iterate over its text piece by piece, round by round; the arguments are those of `generate`.

    A piece never ends within a character, nor within what may become a stop string.

    Raises:
      ValueError: as `generate`, or more than one prompt is given.
    """
    if not isinstance(prompt, str) and len(prompt) != 1:
        raise ValueError(f"stream continues one prompt, but {len(prompt)} were given; call generate for several")
    run = _run(stack, prompt, 1, arguments)
    next(run)  # check the arguments and compile now rather than at the first piece
    return Stream(run)


def compare(stack: Level, prompts, **arguments: Unpack[Arguments]) -> Generation:
    """Generate, then decode the same prompts plainly in the fastest form (inexact), and put the ratio of times into the report."""
    ours = generate(stack, prompts, **arguments)
    arguments.pop("synthetic_acceptance", None)
    plain = Level(stack.model, stack.params, card=dataclasses.replace(stack.card, exact=False))
    baseline = generate(plain, prompts, **arguments)
    per_token = [g.report["seconds"] / max(g.report["new_tokens"], 1) for g in (baseline, ours)]
    return dataclasses.replace(ours, report=ours.report | {"speedup": per_token[0] / per_token[1]})


def _run(stack: Level, prompts, rounds: int, arguments: dict[str, Any]):
    """Check, compile, then yield the new text of each row after every `rounds` rounds; return the Generation.

    The first yield comes before anything is generated.
    """
    batch, sampling, stops = _request(stack, prompts, dict(arguments))
    compile_seconds = _compile(stack, batch, sampling)
    yield [""] * len(batch.length)

    began = time.perf_counter()
    rows, begin, limit = range(len(batch.length)), np.asarray(batch.length), np.array(batch.limit)
    prompt_tokens = [np.asarray(batch.tokens)[r, : begin[r]].tolist() for r in rows]
    decoders = [Decoder(stack.card.tokenizer, prompt, stops) if stack.card.tokenizer else None for prompt in prompt_tokens]
    state = _init(stack, batch.tokens, batch.length, sampling, prefill_width=batch.prefill_width)
    while True:
        state = _advance(stack, state, jnp.asarray(limit), sampling, np.int32(rounds))
        tokens, length, ended = jax.device_get((state.tokens, state.length, state.ended))
        new = [tokens[r, begin[r] : length[r]].tolist() for r in rows]
        pieces = [decoder.push(ids) if decoder else "" for decoder, ids in zip(decoders, new, strict=True)]
        stopped = [decoder is not None and decoder.stopped for decoder in decoders]
        limit = np.where(stopped, length, limit)
        done = ended | (length >= limit)
        yield [pieces[r] + decoders[r].finish(new[r]) if done[r] and decoders[r] else pieces[r] for r in rows]
        if done.all():
            break
    timing = report.Timing(time.perf_counter() - began, compile_seconds)
    new = [ids[: decoders[r].tokens_to_stop(ids)] if stopped[r] else ids for r, ids in enumerate(new)]
    logprobs = None
    if state.logprobs is not None:
        logprobs = [np.asarray(state.logprobs)[r, begin[r] : begin[r] + len(new[r])].tolist() for r in rows]
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


def _request(stack: Level, prompts, arguments: dict[str, Any]) -> tuple[Batch, Sampling, tuple[str, ...]]:
    """Check all arguments and turn them into a batch, its sampling and its stop strings."""
    unknown = sorted(set(arguments) - set(Arguments.__annotations__))
    if unknown:
        raise ValueError(f"'{unknown[0]}' is not supported; supported: {', '.join(sorted(Arguments.__annotations__))}")
    stops = arguments.pop("stop", None)
    stops = () if stops is None else (stops,) if isinstance(stops, str) else tuple(stops)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop is {stops!r}, but must be a non-empty string or several")
    if stops and stack.card.tokenizer is None:
        raise ValueError(f"{stack.card.name} has no tokenizer, which stop strings need; use stop_token_ids")
    batch_arguments = {name: arguments.pop(name) for name in ("max_new_tokens", "chat") if name in arguments}
    if arguments.get("stop_token_ids") is None:
        arguments["stop_token_ids"] = stack.card.eos_token_ids
    batch = prepare(stack, prompts, **batch_arguments)
    sampling = Sampling.create(len(batch.length), stack.model.vocab_size, **arguments)
    speculation.check(stack, sampling)
    return batch, sampling, stops


def _compile(stack: Level, batch: Batch, sampling: Sampling) -> float:
    """Compile by a call that has nothing to do (no prompt to feed, every row at its limit); return its seconds."""
    began = time.perf_counter()
    one = jnp.ones_like(batch.length)
    state: State = _init(stack, batch.tokens, one, sampling, prefill_width=batch.prefill_width)
    jax.block_until_ready(_advance(stack, state, one, sampling, np.int32(ALL_ROUNDS)))
    return time.perf_counter() - began
