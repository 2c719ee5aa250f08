"""Draws what happened in one generation, to scale: a lane a level, a box a pass, drafted tokens rising to what judges them.

    python examples/timeline.py
    python examples/timeline.py --model path/to/model --draft mxfp4:6 --draft ngram:3 --prompt "def area(r):"

Stacks take turns, each several times, which gives the same passes every time; what is drawn is the median of each time, the log's
included.
"""

import argparse
import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from recording import Log, recorded

import mlspecqd_jax as mlsd
from mlspecqd_jax import specs

PROMPT = "class Rectangle:\n    def __init__(self, width, height):\n        self.width = width\n        self.height = height\n"


class Pass(NamedTuple):
    """A pass of a level: the draft that it judged, how much of that it accepted, and what it put out (its own token last)."""

    depth: int
    began: float
    ended: float
    draft: list[int]
    accepted: int
    appended: list[int]


def passes(events, text, end: int, depth: int = 0, begin: int | None = None) -> Iterator[Pass]:
    """Yield the passes of a level, each after those of what drafted for it.

    Args:
      events: in order, of this level and those below it.
      text: what the level put out, position -> token.
      end: the length that it reached.
      depth: of the level.
      begin: the length that it had; None is that of its first pass, if that feeds no token again.
    """
    own = [i for i, event in enumerate(events) if event.depth == depth]
    reached = [*(events[i].start + 1 for i in own), end]
    if begin is not None:  # only a draft's first pass may feed tokens before the pending one
        reached[0] = begin
    refed = [length - 1 - events[i].start for length, i in zip(reached, own, strict=False)]
    groups = itertools.pairwise([-1, *own])
    for (before, i), (length, then), n in zip(groups, itertools.pairwise(reached), refed, strict=True):
        event, below = events[i], events[before + 1 : i]
        draft = list(itertools.takewhile(lambda token: token != mlsd.PADDING, event.window[1 + n :]))
        if below and below[-1].start >= 0:  # those of a level
            window = {event.start + j: token for j, token in enumerate(event.window)}
            yield from passes(below, window, length + len(draft), depth + 1, length)
        appended = [text[position] for position in range(length, then)]
        kept = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(draft, appended, strict=False))
        yield Pass(depth, event.began, event.ended, draft, len(list(kept)), appended)


class Run(NamedTuple):
    """A generation as it went."""

    names: list[str]  # of the levels, outermost first, and of a drafter below them
    passes: list[Pass]
    new: list[int]  # tokens
    seconds: float
    seconds_unlogged: float  # of the same without the log


def runs(stacks: list[mlsd.Level], prompt: str, new_tokens: int, repeated: int) -> list[Run]:
    """Continue the prompt greedily with each stack in turn, with a log and without, and return each one's medians."""
    log, measured = Log(), [[] for _ in stacks]
    logged = [recorded(stack.level, log) for stack in stacks]
    for _ in range(repeated + 1):
        for stack, telling, found in zip(stacks, logged, measured, strict=True):
            found.append([once(stack, ours, log, prompt, new_tokens) for ours in (telling, stack)])
    return [summary(stack, found[1:]) for stack, found in zip(stacks, measured, strict=True)]  # the first ones compiled


def once(stack: mlsd.Stack, ours: mlsd.Level, log: Log, prompt: str, new_tokens: int):
    """Return (batch, end state, events, when it began, when it ended) of a generation by `ours`, the stack or the logged one."""
    batch = mlsd.prepare(stack, prompt, max_new_tokens=new_tokens)
    sampling = mlsd.Sampling.create(1, stack.card.vocab_size, stop_token_ids=stack.card.eos_token_ids)
    init, advance = (jax.jit(f, compiler_options=mlsd.compiler_options(stack)) for f in (mlsd.init, mlsd.advance))
    state = jax.block_until_ready(init(stack, batch.tokens, batch.length, sampling))
    log.events.clear()
    began = time.perf_counter()
    state = jax.block_until_ready(advance(ours, state, batch.limit, sampling))
    return batch, state, list(log.events), began, time.perf_counter()


def summary(stack: mlsd.Stack, found: list) -> Run:
    """Return the passes of generations that did the same, each time the median of theirs."""
    stamps = [[began, *(t for event in events for t in event[-2:]), ended] for (_, _, events, began, ended), _ in found]
    between = [statistics.median(each) for each in zip(*([b - a for a, b in itertools.pairwise(s)] for s in stamps), strict=True)]
    times = [0.0, *itertools.accumulate(between)]
    batch, state, events, *_ = found[-1][0]
    events = [e._replace(began=times[2 * i + 1], ended=times[2 * i + 2]) for i, e in enumerate(events)]
    begin, end = int(batch.length[0]), int(state.length[0])
    text = np.asarray(state.tokens)[0].tolist()
    passed = passes(events, text, end)
    names = [card.name for card in stack.cards] + ["look-up"] * (stack.levels[-1].drafter is not None)
    unlogged = statistics.median(ended - began for _, (*_, began, ended) in found)
    return Run(names, list(passed), text[begin:end], times[-1], unlogged)


def main(argv: list[str] | None = None) -> list[Run]:
    """Run with drafts and plainly, draw both, and return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help="a folder, an owner/name id, or a demo")
    add("--draft", action="append", help="as for mlspecqd generate, outermost first; else mxfp4:8 and ngram:3")
    add("--prompt", default=PROMPT, help="a short one, since it is drawn too")
    add("--new-tokens", type=int, default=40, help="after the prompt")
    add("--runs", type=int, default=5, help="of which the medians are drawn")
    add("--plot", type=Path, default=Path("timeline"), help="where the plot goes, as .png and .svg")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib; pip install '.[plot]'")
    from timeline_plot import draw

    model = mlsd.load(options.model)
    stack = specs.stack_of(specs.parse(options.draft or ["mxfp4:8", "ngram:3"]), model, mlsd.load)
    both = runs([stack, mlsd.stack(model)], options.prompt, options.new_tokens, options.runs)
    for run in both:
        print(f"{' > '.join(run.names)}: {len(run.new)} tokens, {run.seconds:.3f} s; {run.seconds_unlogged:.3f} s without the log")
    device = f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    decoded = [model.tokenizer.decode(token) for token in both[0].new]
    print(*draw(*both, options.prompt, decoded, f"greedy, bfloat16, {device}", options.plot))
    return both


if __name__ == "__main__":
    main()
