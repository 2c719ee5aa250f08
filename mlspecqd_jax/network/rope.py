"""Rotary position embedding (Su et al., arXiv 2104.09864) and the scalings of its frequencies.

A scaling is chosen once, by the model alone: what is computed of a text never changes as it grows.

Notation: B batch, W window, D head size, R <= D how many of a head's elements are rotated. Pairs are (i, i + R/2), Hugging Face's
order.
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
    "yarn": ("factor", "original_max_position_embeddings"),
    "proportional": (),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


def rotated(parameters: Mapping[str, Any], head_dim: int) -> int:
    """Return how many of a head's elements are rotated, R; some of them perhaps by nothing."""
    if parameters.get("rope_type") == "proportional":
        return head_dim
    return int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))


def rope_of(parameters: Mapping[str, Any], head_dim: int, max_positions: int = 0, interleaved: bool = False) -> Rope:
    """Return the rotation of heads of a size [D] that transformers' `rope_parameters` describe.

    Args:
      parameters: with the keys of their kind (`ROPE_TYPES`).
      head_dim: D.
      max_positions: of the model: longrope takes its long factors where these are more than the original ones.
      interleaved: whether pairs are (2i, 2i + 1).
    """
    theta, kind, size = float(parameters["rope_theta"]), parameters["rope_type"], rotated(parameters, head_dim)
    plain = [theta ** (-i / size) for i in range(0, size, 2)]
    match kind:
        case "default":
            return Rope(tuple(plain), interleaved=interleaved)
        case "proportional":  # the first pairs of the whole head, at the frequencies that they would have if all turned
            turning = int((parameters.get("partial_rotary_factor") or 1.0) * head_dim // 2)
            by = parameters.get("factor") or 1.0
            return Rope(tuple(f / by if i < turning else 0.0 for i, f in enumerate(plain)), interleaved=interleaved)
        case "linear":
            return Rope(tuple(f / parameters["factor"] for f in plain), interleaved=interleaved)
        case "llama3":
            found = (_llama3_frequency(f, *(parameters[key] for key in ROPE_TYPES["llama3"])) for f in plain)
            return Rope(tuple(found), interleaved=interleaved)
        case "yarn":
            return Rope(_yarn_frequencies(plain, theta, parameters), _yarn_magnitude(parameters), interleaved)
        case "longrope":
            original = parameters["original_max_position_embeddings"]
            factors = parameters["long_factor" if max_positions > original else "short_factor"]
            stretched = parameters.get("factor") or max_positions / original
            known = parameters.get("attention_factor")
            magnitude = math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0
            return Rope(tuple(f / by for f, by in zip(plain, factors, strict=True)), known or magnitude, interleaved)
    raise InputError(f"rope_type '{kind}' is not supported; supported: {', '.join(ROPE_TYPES)}")


def _yarn_frequencies(plain: list[float], theta: float, parameters: Mapping[str, Any]) -> tuple[float, ...]:
    """Keep what turns often within the original context, divide the rest, with a ramp over pairs (YaRN, arXiv 2309.00071, 3.2)."""
    original, size = parameters["original_max_position_embeddings"], 2 * len(plain)

    def pair(turns):  # which, as a number that need not be whole, turns so often
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(parameters.get("beta_fast") or 32), pair(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(plain))]
    return tuple(f * (1 - divided) + f / parameters["factor"] * divided for f, divided in zip(plain, ramp, strict=True))


def _yarn_magnitude(parameters: Mapping[str, Any]) -> float:
    def grown(by):
        return 0.1 * by * math.log(parameters["factor"]) + 1 if parameters["factor"] > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]
    both = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return grown(both[0]) / grown(both[1]) if all(both) else grown(1)


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
