"""Weights that try a product, and what its result must be."""

import jax.numpy as jnp
import numpy as np

from mlspecqd_jax.weights.formats import FORMATS
from pallas_kernels import mx_decode

# What each product of a quantized weight is for.
CHIPS = {"tpu": "TPU v5 lite", "tpu without subnormals": "TPU v5 lite", "gpu": "sm_90", "grouped": "TPU v3", "reduced": "sm_75"}
CHIPS |= {"decoded": "cpu", "tpu table": "TPU v5 lite", "tpu table without subnormals": "TPU v5 lite", "gpu table": "sm_90"}

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = np.concatenate([VALUES, -VALUES])
SCALES = 253  # bytes from 0 on: with those from 253 on, 6 is beyond bfloat16


def decode(codes, scales, format="mxfp4"):
    """Return the values of a weight as float64 [N, K]."""
    element = FORMATS[format].element
    return np.asarray(mx_decode(codes, scales, element.exponent_bits, element.mantissa_bits), np.float64)


def random(n: int, k: int, m: int, dtype=jnp.bfloat16, format="mxfp4"):
    """Return (x [M, K], codes, scales): random codes, scales over nine powers of two, some bytes 0, and rows of different size."""
    r = np.random.RandomState(n + k + m)
    scales = np.where(r.rand(n, k // 32) < 0.1, 0, r.randint(118, 127, (n, k // 32)))
    x = r.standard_normal((m, k)) * np.exp2(r.randint(-6, 7, (m, 1)))
    f = FORMATS[format]
    codes = r.randint(0, 256, (n, f.code_bytes(k)))
    if f.bits == 8:
        codes = np.where(codes & 0x7C == 0x7C, 0, codes)  # among them infinities and NaN, which stand for no weight
    return jnp.asarray(x, dtype), jnp.asarray(codes, jnp.uint8), jnp.asarray(scales, jnp.uint8)


def every_code_at_every_scale():
    """Return (packed, scales) of a weight [SCALES, 512]: row s has scale byte s, and MX block c code c at place 2c, else zeros."""
    codes = np.zeros((SCALES, 16, 32), np.uint8)
    for c in range(16):
        codes[:, c, 2 * c % 32] = c
    flat = codes.reshape(SCALES, 512)
    scales = np.repeat(np.arange(SCALES, dtype=np.uint8)[:, None], 16, axis=1)
    return jnp.asarray(flat[:, ::2] | flat[:, 1::2] << 4), jnp.asarray(scales)


def ones(m: int, packed):
    """Return x [M, K]: row r picks the element with code r (mod 16) of `every_code_at_every_scale`."""
    x = np.zeros((m, packed.shape[1] * 2))
    for r in range(m):
        x[r, r % 16 * 32 + 2 * (r % 16)] = 1
    return jnp.asarray(x, jnp.bfloat16)


def assert_exact_elements(found, packed, scales, least: float):
    """Each result is one element: exact, where it is not below `least`."""
    exact = VALUES[np.arange(found.shape[0]) % 16][:, None] * np.exp2(np.arange(SCALES) - 127.0) * (np.arange(SCALES) > 0)
    normal = np.abs(exact) >= least
    np.testing.assert_array_equal(found[normal], exact[normal].astype(np.float32))
    assert np.all(np.abs(found[np.abs(exact) < least]) <= least)


def assert_product(found, x, codes, scales, format="mxfp4"):
    """As the float64 product of what is stored, within what rounding a sum to float32 at every step may cost.

    Of float32 x every term may add a rounding, in whatever order they come; of 16 bits hardly any does within an MX block.
    """
    steps = x.shape[1] if x.dtype == jnp.float32 else 2 + x.shape[1] // 32
    w, x = decode(codes, scales, format), np.asarray(x, np.float64)
    assert found.dtype == np.float32
    assert found.shape == (x.shape[0], w.shape[0])
    assert np.all(np.abs(found - x @ w.T) <= steps * 2.0**-24 * (np.abs(x) @ np.abs(w).T))


def assert_not_finite_rows(product, m: int, format="mxfp4"):
    """A NaN or infinity in a row of x makes what the definition makes of that row, and nothing of the others."""
    x, codes, scales = random(40, 160, m, format=format)
    bad = x.at[0, 33].set(jnp.nan).at[1, 70].set(-jnp.inf)
    found, plain = product(bad, codes, scales), product(x, codes, scales)
    assert np.all(np.isnan(found[0]))
    weight = decode(codes, scales, format)[:, 70]
    np.testing.assert_array_equal(found[1][weight != 0], -np.inf * np.sign(weight[weight != 0]))
    assert np.all(np.isnan(found[1][weight == 0]))
    np.testing.assert_array_equal(found[2:], plain[2:])
