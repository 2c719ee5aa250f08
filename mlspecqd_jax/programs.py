"""The programs of a generation: which functions are compiled, and how."""

import functools
from typing import Any, NamedTuple

import jax

from mlspecqd_jax.kept_programs import Kept
from mlspecqd_jax.kept_values import keeping
from mlspecqd_jax.speculation import loop
from mlspecqd_jax.speculation.protocols import depends_of
from mlspecqd_jax.speculation.stack import Stack, outermost
from mlspecqd_jax.stopwatch import Stopwatch

# Else XLA:GPU times several algorithms for each product whenever it compiles, and two programs may get two for the same product:
# 7 of 64 rows of a real model differed on an H200, and none of 192 with cuBLAS alone, which takes one algorithm for a shape. XLA
# also joins the weights that multiply the same x, in every pass: at 8B plain decoding took 1.10 times as long there.
ONE_ALGORITHM = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


class Programs(NamedTuple):
    """The jitted functions of a generation; each compiles anew for other shapes."""

    begin: Any
    feed: Any
    advance: Any


def programs(stack: Stack) -> Programs:
    """Return the functions that run a stack."""
    options = tuple(compiler_options(stack).items())
    # Elsewhere than on CPU no kept program has been loaded yet, and jax's own cache spares the longest part.
    return _kept(options) if keeping() and _platform(stack) == "cpu" else _jitted(options)


def preparing(stack: Stack) -> dict[str, tuple[float, float]]:
    """Return how long it took, in seconds and the processors' seconds, to trace, lower, compile or load a stack's programs so far.

    It is known of programs that are kept alone.
    """
    watches = [getattr(program, "watch", Stopwatch()) for program in programs(stack)]
    names = dict.fromkeys(name for watch in watches for name in watch.spent)
    spent = {name: [watch.spent.get(name, (0.0, 0.0)) for watch in watches] for name in names}
    return {name: (sum(s for s, _ in pairs), sum(p for _, p in pairs)) for name, pairs in spent.items()}


def compiler_options(stack: Stack) -> dict[str, Any]:
    """Return the `compiler_options` of a `jax.jit` that runs this stack: on GPU an exact one needs the same products everywhere."""
    platform = _platform(stack)
    return dict(ONE_ALGORITHM) if isinstance(stack, Stack) and stack.exact and platform == "gpu" else {}


def _platform(stack) -> str:
    return next(iter(jax.tree.leaves(outermost(stack).params)[0].devices())).platform


@functools.cache
def _jitted(options: tuple[tuple[str, Any], ...]) -> Programs:
    jit = functools.partial(jax.jit, compiler_options=dict(options))
    return Programs(
        begin=jit(loop.begin),
        feed=jit(loop.feed, static_argnames="prefill_width", donate_argnames="state"),
        advance=jit(loop.advance, donate_argnames="state"),
    )


@functools.cache
def _kept(options: tuple[tuple[str, Any], ...]) -> Programs:
    kept = functools.partial(Kept, depends=_depends, compiler_options=dict(options))
    begin = functools.partial(jax.eval_shape, loop.begin)
    return Programs(
        begin=kept("begin", loop.begin, begin),
        feed=kept("feed", loop.feed, _state, static="prefill_width", donate_argnames="state"),
        advance=kept("advance", loop.advance, _state, donate_argnames="state"),
    )


def _state(stack, state, *others, **more):
    return state


def _depends(stack, *others, **more):
    return [depends_of(level.model, level.params) for level in outermost(stack).levels]
