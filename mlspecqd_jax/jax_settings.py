"""The settings of jax that this code is written for, held wherever it runs, so that a caller's own change nothing."""

import functools
from collections.abc import Callable

import jax


def held(function: Callable) -> Callable:
    """Run a function with 32-bit numbers and the one stream of random bits.

    A caller may have set `jax_enable_x64` or `jax_threefry_partitionable`, here or in a trace of its own around this. How jax
    promotes types and ranks is left to the caller: no code of ours counts on it, and a scorer or a drafter of theirs may.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        with (
            jax.enable_x64(False),
            jax.threefry_partitionable(True),
        ):
            return function(*args, **kwargs)

    return run
