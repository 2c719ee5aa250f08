"""Rotary position embedding (Su et al., arXiv 2104.09864) and the scalings of its frequencies.

Notation: B batch, W window, D head size. Pairs are (i, i + D/2), Hugging Face's order.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

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


def angles(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, f32 [B, W, D / 2], of positions int32 [B, W] times frequencies f32 [D / 2]."""
    turned = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(turned), jnp.sin(turned)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + D/2) of x [B, W, heads, D] by the given angles, in f32; return [B, heads, W, D]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.swapaxes(jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype), 1, 2)
