"""Rotary position embedding (Su et al., arXiv 2104.09864) and the scalings of its frequencies.

Notation: B batch, W window, D head size. Pairs are (i, i + D/2), Hugging Face's order.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

import cpu_kernels
from mlspecqd_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequency scaling; `rope_type` is "default", "linear" or "llama3" (the other fields belong to the last two)."""

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling) -> list[float]:
    """Return the rotary inverse frequencies [D / 2] of heads of size `dim` (Su et al., arXiv 2104.09864)."""
    plain = [theta ** (-i / dim) for i in range(0, dim, 2)]
    match scaling.rope_type:
        case "default":
            return plain
        case "linear":
            return [f / scaling.factor for f in plain]
        case "llama3":
            return [_llama3_frequency(f, scaling) for f in plain]
    raise InputError(f"rope_type '{scaling.rope_type}' is not supported; supported: default, linear, llama3")


def _llama3_frequency(frequency: float, s: RopeScaling) -> float:
    """Keep high frequencies, divide low ones by `factor`, interpolate between (Llama 3.1's context extension)."""
    turns = s.original_max_position_embeddings * frequency / (2 * math.pi)  # full turns within the original context
    smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = min(max(smooth, 0.0), 1.0)
    return (1 - smooth) * frequency / s.factor + smooth * frequency


def rotary(positions: jax.Array, frequencies: list[float]) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, f32 [B, W, D / 2], of the rotation angles at positions int32 [B, W]."""

    def in_xla(positions, frequencies):
        angles = positions.astype(jnp.float32)[..., None] * frequencies
        return jnp.cos(angles), jnp.sin(angles)

    frequencies = jnp.asarray(frequencies, jnp.float32)
    return tuple(cpu_kernels.on_cpu(cpu_kernels.angles, in_xla, positions.astype(jnp.int32), frequencies, unit="positions"))


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
