"""What the kernels for weights in any format ask of a format, and what they are called (`tpu_tables`, `gpu_tables`).

A format is `weights.formats.Format`: element, group, scale, minimum, rows, bits.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.product import MX

GROUPS = (16, 32, 64, 128, 256)  # of integers; other sizes would lie across what a kernel takes at once
INTEGERS = ("int8", "int4", *(f"{kind}_g{size}" for kind in ("int4", "uint4", "int8", "uint8") for size in GROUPS))
WITHOUT_SUBNORMALS = (MX[0], "nvfp4", *INTEGERS)  # that a TPU decodes without making such numbers
FORMATS = (*MX, "nvfp4", "fp8_e4m3", "fp8_e4m3_128x128", *INTEGERS)


def is_integer(format: Any) -> bool:
    """Return whether the elements are integers; others are small floats."""
    return hasattr(format.element, "offset")


def small_floats(codes: jax.Array, exponent_bits: int, mantissa_bits: int) -> jax.Array:
    """Return what int32 codes of a small float stand for, as f32: `reference.element_values` for kernels, by few operations."""
    bias, magnitude = 2 ** (exponent_bits - 1) - 1, codes & 2 ** (exponent_bits + mantissa_bits) - 1
    normal = (magnitude << 23 - mantissa_bits) + (127 - bias << 23)
    whole = 24 - bias - mantissa_bits  # the last bit of numbers from 2^whole on is the least subnormal one
    subnormal = jax.lax.bitcast_convert_type(magnitude | 127 + whole << 23, jnp.float32) - 2.0**whole
    value = jnp.where(magnitude < 2**mantissa_bits, subnormal, jax.lax.bitcast_convert_type(normal, jnp.float32))
    return jnp.where(codes >> exponent_bits + mantissa_bits == 1, -value, value)


def numbers(scales: jax.Array, format: Any) -> jax.Array:
    """Return scales as f32; those of E8M0 are a float32 whose exponent is the byte, and the byte 0 is the number 0."""
    if format.scale == "e8m0":
        return jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    return small_floats(scales.astype(jnp.int32), 4, 3) if format.scale == "e4m3" else scales.astype(jnp.float32)


def by_output(scales: jax.Array, format: Any, n: int) -> jax.Array:
    """Return the scales of a weight of n outputs, for each of these a row of its own."""
    return scales if format.rows == 1 else jnp.repeat(scales, format.rows, axis=0)[:n]


def weight_by_weight(run: Callable) -> Callable:
    """Return `Product.run` of a kernel for experts: a weight by itself is that of the only expert, and every row's.

    Args:
      run: `Product.by_experts`.
    """

    def of_one(x, arrays, *, n, chip, format, interpret, used=None):
        nobody_else = jnp.zeros((x.shape[0], 1), jnp.int32)
        return run(x[:, None], nobody_else, arrays, e=1, n=n, chip=chip, format=format, interpret=interpret)[:, 0]

    return of_one


def times_factors(y: jax.Array, experts: jax.Array, arrays: Mapping[str, jax.Array]) -> jax.Array:
    """Return y [T, C, N] times the scales of whole rows, "factors" [E, N], where there are such."""
    factors = arrays.get("factors")
    return y if factors is None else y * factors[jnp.maximum(experts, 0)]
