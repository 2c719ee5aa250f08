"""The settings of jax that this code is written for, held wherever it runs, so that a caller's own change nothing."""

import functools
from collections.abc import Callable

import jax


def held(function: Callable) -> Callable:
    """Run a function with 32-bit numbers, jax's usual promotions of types and ranks, and the one stream of random bits.

    A caller may have set `jax_enable_x64`, `jax_numpy_dtype_promotion` ("strict"), `jax_numpy_rank_promotion` ("raise") or
    `jax_threefry_partitionable`, here or in a trace of its own around this.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        with (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.threefry_partitionable(True),
        ):
            return function(*args, **kwargs)

    return run
