"""The programs of a generation: which functions are compiled, and how."""

import functools
from typing import Any, NamedTuple

import jax

from mlspecqd_jax.speculation import loop
from mlspecqd_jax.speculation.stack import Stack, outermost

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
    return _jitted(tuple(compiler_options(stack).items()))


def compiler_options(stack: Stack) -> dict[str, Any]:
    """Return the `compiler_options` of a `jax.jit` that runs this stack: on GPU an exact one needs the same products everywhere."""
    level = outermost(stack)
    platform = next(iter(jax.tree.leaves(level.params)[0].devices())).platform
    return dict(ONE_ALGORITHM) if isinstance(stack, Stack) and stack.exact and platform == "gpu" else {}


@functools.cache
def _jitted(options: tuple[tuple[str, Any], ...]) -> Programs:
    jit = functools.partial(jax.jit, compiler_options=dict(options))
    return Programs(
        begin=jit(loop.begin),
        feed=jit(loop.feed, static_argnames="prefill_width", donate_argnames="state"),
        advance=jit(loop.advance, donate_argnames="state"),
    )
