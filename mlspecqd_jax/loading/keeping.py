"""What was measured of a model is kept in the user's cache by the weights' own bits, each file whole or not at all."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp


def key_of(params: Mapping[str, jax.Array], *said: Any) -> str:
    """Return a name that changes, almost surely, with any bit of a weight, and with whatever else is said (as JSON)."""
    digests = {name: [int(part) for part in _digest(w)] for name, w in sorted(params.items())}
    return hashlib.sha256(json.dumps([*said, digests]).encode()).hexdigest()[:32]


@jax.jit
def _digest(w):
    """Two numbers that change, almost surely, with any bit of a weight."""
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16 if w.dtype.itemsize == 2 else jnp.uint32).astype(jnp.uint32).ravel()
    place = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) + jnp.uint32(1)
    return jnp.stack([jnp.sum(bits), jnp.sum(bits * place)])


def keep(file: pathlib.Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file whole or not at all; without a cache what it holds is made again next time."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as opened:
                write(opened)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError:
        return
