"""Row gathers and window writes: in C++ where that runs, else in the form that XLA does best (`pallas_kernels.xla`).

Notation: B batch, H heads, S cache length, W window, D head size.
"""

import jax

import cpu_kernels
from pallas_kernels import xla
from pallas_kernels.xla import rows

__all__ = ["put_window", "rows"]


def put_window(buffer: jax.Array, start: jax.Array, values: jax.Array) -> jax.Array:
    """Store values [B, H, W, D] in buffer [B, H, S, D] at positions start[r] + 0..W-1; what falls beyond the buffer is dropped."""
    return cpu_kernels.on_cpu(cpu_kernels.put_window, xla.put_window, buffer, start, values, unit="positions")
