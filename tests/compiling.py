"""Compiling with less optimization, for what takes longer to compile than to run and shows nothing that depends on it."""

import functools
import os

import jax
import jax.numpy as jnp

_LEAST = {"xla_backend_optimization_level": 0}
_WITHOUT_EMITTERS = _LEAST | {"xla_cpu_use_fusion_emitters": False}


@functools.cache
def quick_options() -> dict[str, int | bool]:
    """Return `compiler_options` of a `jax.jit` that asks XLA for less: on CPU it takes a third of the time."""
    try:
        jax.jit(jnp.negative, compiler_options=_WITHOUT_EMITTERS)(0)
    except jax.errors.JaxRuntimeError:  # not every version of XLA knows it
        return _LEAST
    return _WITHOUT_EMITTERS


def quick_jit(function, **options):
    """Return `jax.jit` of a function, compiled with `quick_options`."""
    return jax.jit(function, compiler_options=quick_options(), **options)


def quick_flags(*more: str) -> dict[str, str]:
    """Return the variable of the environment by which a process of its own compiles so, with more of XLA's flags."""
    flags = (f"--{name}={str(value).lower()}" for name, value in quick_options().items())
    return {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags, *more]).strip()}
