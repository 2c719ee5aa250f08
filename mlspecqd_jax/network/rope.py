"""Rotary position embedding (Su et al., arXiv 2104.09864) and the scalings of its frequencies.

Notation: B batch, W window, D head size. Pairs are (i, i + D/2), Hugging Face's order.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import cpu_kernels
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.network.config import Rope

# The keys that each kind of rope_parameters needs beside rope_theta.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_of(parameters: Mapping[str, Any], head_dim: int) -> Rope:
    """Return the rotation of heads of a size [D] that transformers' `rope_parameters` describe."""
    theta, kind = float(parameters["rope_theta"]), parameters["rope_type"]
    plain = [theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    match kind:
        case "default":
            return Rope(tuple(plain))
        case "linear":
            return Rope(tuple(f / parameters["factor"] for f in plain))
        case "llama3":
            return Rope(tuple(_llama3_frequency(f, *(parameters[key] for key in ROPE_TYPES["llama3"])) for f in plain))
    raise InputError(f"rope_type '{kind}' is not supported; supported: {', '.join(ROPE_TYPES)}")


def _llama3_frequency(frequency: float, factor: float, low: float, high: float, positions: int) -> float:
    """Keep high frequencies, divide low ones by `factor`, interpolate between (Llama 3.1's context extension)."""
    turns = positions * frequency / (2 * math.pi)  # full turns within the original context
    smooth = (turns - low) / (high - low)
    smooth = min(max(smooth, 0.0), 1.0)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotary(positions: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, f32 [B, W, D / 2], of the rotation angles at positions int32 [B, W], times the rope's magnitude."""

    def in_xla(positions, frequencies):
        angles = positions.astype(jnp.float32)[..., None] * frequencies
        return jnp.cos(angles), jnp.sin(angles)

    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    found = cpu_kernels.on_cpu(cpu_kernels.angles, in_xla, positions.astype(jnp.int32), frequencies, unit="positions")
    return tuple(found) if rope.magnitude == 1 else tuple(rope.magnitude * part for part in found)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + D/2) of x [B, W, heads, D] by the given angles, in f32; return [B, heads, W, D]."""
    # XLA:CPU fuses these products and sums with what is around them, otherwise for a window of one row than for others.
    return cpu_kernels.on_cpu(lambda x: _in_cpp(x, cos, sin), lambda x: _in_xla(x, cos, sin), x)


@jax.custom_jvp
def _in_cpp(x, cos, sin):
    return cpu_kernels.rotate(x, cos, sin)


@_in_cpp.defjvp
def _(primals, tangents):
    return _in_cpp(*primals), jax.jvp(_in_xla, primals, tangents)[1]


def _in_xla(x, cos, sin):
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.swapaxes(jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype), 1, 2)
