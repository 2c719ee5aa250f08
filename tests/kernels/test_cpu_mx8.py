"""The C++ product of MX formats of eight bits: the definition, for every code and scale, and rows that depend on nothing else."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from windows import assert_rows_in_use

import cpu_kernels
from mlspecqd_jax.network.ops import linear
from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.formats import FORMATS, MX
from pallas_kernels import mx_decode

ISAS = cpu_kernels.isas("mx8_matmul")
ONE_BYTE = [format.name for format in MX if format.bits == 8]

pytestmark = pytest.mark.skipif(not ISAS, reason="needs a C++ compiler")

each_isa = pytest.mark.parametrize("isa", ISAS)
each_format = pytest.mark.parametrize("format", ONE_BYTE)


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(ml_dtypes.bfloat16)


def mx8(x, codes, scales, format, isa=None, used=None):
    f, arrays = FORMATS[format].element, [jnp.asarray(array) for array in (x, codes, scales)]
    return np.asarray(cpu_kernels.mx8_matmul(*arrays, f.exponent_bits, f.mantissa_bits, isa, used))


def decoded(codes, scales, format):
    f = FORMATS[format].element
    return np.asarray(mx_decode(jnp.asarray(codes), jnp.asarray(scales), f.exponent_bits, f.mantissa_bits), np.float64)


@each_isa
@each_format
@pytest.mark.parametrize(("n", "k"), [pytest.param(13, 544, marks=pytest.mark.slow), (3, 96)])
def test_it_is_the_product_with_the_decoded_weight_and_rows_depend_on_nothing_else(isa, format, n, k):
    x, leaf = normal(19, k), quantize(jnp.asarray(normal(n, k, seed=1)), format)
    whole = mx8(x, leaf.arrays["codes"], leaf.arrays["scales"], format, isa)
    terms = np.abs(x.astype(np.float64)) @ np.abs(decoded(leaf.arrays["codes"], leaf.arrays["scales"], format)).T
    exact = x.astype(np.float64) @ decoded(leaf.arrays["codes"], leaf.arrays["scales"], format).T
    assert np.all(np.abs(whole - exact) <= 2.0**-21 * terms + 1e-30)
    for m in range(1, 10) if (n, format) == (13, "mxfp8_e4m3") else (1, 3, 8):
        np.testing.assert_array_equal(mx8(x[:m], leaf.arrays["codes"], leaf.arrays["scales"], format, isa), whole[:m])
    np.testing.assert_array_equal(mx8(x[5:6], leaf.arrays["codes"], leaf.arrays["scales"], format, isa), whole[5:6])
    half = n // 2  # another place in a tile
    np.testing.assert_array_equal(mx8(x, leaf.arrays["codes"][half:], leaf.arrays["scales"][half:], format, isa), whole[:, half:])
    if n == 13:
        assert_rows_in_use(lambda x, used: mx8(x, leaf.arrays["codes"], leaf.arrays["scales"], format, isa, used), x, whole)


@each_isa
@each_format
def test_every_code_at_every_scale_is_exact(isa, format):
    """Row r of x picks element r of each row of the weight; results below 2^-112 may be zero."""
    f = FORMATS[format]
    codes = np.arange(1 << f.bits, dtype=np.uint8)
    if format == "mxfp8_e5m2":
        codes = np.where((codes & 0x7F) < 0x7C, codes, 0)  # the rest is infinity and NaN
    k = len(codes)
    scales = np.arange(254 - f.element.emax, dtype=np.uint8)  # the largest that is finite is the last
    scales = np.repeat(scales[:, None], k // 32, axis=1)
    codes = np.tile(codes, (len(scales), 1))
    exact = decoded(codes, scales, format).T
    found = mx8(np.eye(k, dtype=ml_dtypes.bfloat16), codes, scales, format, isa)
    large = np.abs(exact) >= 2.0**-112
    np.testing.assert_array_equal(found[large], exact[large])
    assert np.all((found[~large] == exact[~large]) | (found[~large] == 0))
    assert not found[:, 0].any()  # a scale of 0 is one of zero


@each_isa
@pytest.mark.parametrize("where", [0, 40, 95])
def test_nan_and_infinity_stay_in_their_rows(isa, where):
    x, leaf = normal(6, 96), quantize(jnp.asarray(normal(9, 96, seed=1)), "mxfp8_e4m3")
    clean = mx8(x, leaf.arrays["codes"], leaf.arrays["scales"], leaf.format, isa)
    x[1, where], x[2, where], x[4, where] = np.nan, np.inf, -np.inf
    y = mx8(x, leaf.arrays["codes"], leaf.arrays["scales"], leaf.format, isa)
    assert not np.isfinite(y[[1, 2, 4]]).any()
    np.testing.assert_array_equal(y[[0, 3, 5]], clean[[0, 3, 5]])


@each_format
def test_linear_runs_it_for_bfloat16_and_xla_elsewhere(format):
    x, leaf = jnp.asarray(normal(3, 70)), quantize(jnp.asarray(normal(33, 70, seed=1)), format)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(leaf, jnp.float32), np.float64).T
    np.testing.assert_allclose(linear(x, leaf, out_dtype=jnp.float32), exact, rtol=1e-5, atol=1e-5)
    assert "mlspecqd_mx8_matmul" in jax.jit(linear).lower(x, leaf).as_text()
    assert "mlspecqd_mx8_matmul" not in jax.jit(linear).lower(x.astype(jnp.float32), leaf).as_text()
    assert "mlspecqd_" not in jax.jit(linear).trace(x, leaf).lower(lowering_platforms=("tpu",)).as_text()


def test_empty_products():
    codes, scales = np.zeros((3, 32), np.uint8), np.zeros((3, 1), np.uint8)
    assert mx8(normal(0, 32), codes, scales, "mxfp8_e4m3").shape == (0, 3)
    assert mx8(normal(2, 32), codes[:0], scales[:0], "mxfp8_e4m3").shape == (2, 0)
    np.testing.assert_array_equal(mx8(normal(2, 0), codes[:, :0], scales[:, :0], "mxfp8_e4m3"), np.zeros((2, 3)))


def test_what_does_not_belong_together_is_refused():
    x, codes, scales = jnp.ones((2, 64), jnp.bfloat16), jnp.ones((3, 64), jnp.uint8), jnp.ones((3, 2), jnp.uint8)
    with pytest.raises(ValueError, match=r"do not belong together; give x \[M, K\], codes \[N, K\]"):
        cpu_kernels.mx8_matmul(x[:, :32], codes, scales, 4, 3)
    with pytest.raises(ValueError, match="should be bfloat16, uint8, uint8"):
        cpu_kernels.mx8_matmul(x.astype(jnp.float32), codes, scales, 4, 3)
    with pytest.raises(ValueError, match="elements are e2m1, but should be one of e4m3, e5m2"):
        cpu_kernels.mx8_matmul(x, codes, scales, 2, 1)
    with pytest.raises(NotImplementedError, match=r"mx8_matmul for amx: this machine has .*portable"):
        cpu_kernels.mx8_matmul(x, codes, scales, 4, 3, "amx")
