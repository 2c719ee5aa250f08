"""The C++ products of MXFP6: their definition in every instruction set of this machine, for every code."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import mx_oracle as oracle
import numpy as np
import pytest
from six_bits import joined, split
from test_cpu_kernels import normal, rounded, rows
from windows import assert_rows_in_use

import cpu_kernels
from mlspecqd_jax.network.ops import linear
from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.formats import FORMATS
from mlspecqd_jax.weights.products import product_of

ISAS = cpu_kernels.isas("mxfp6_matmul")

pytestmark = pytest.mark.skipif(not ISAS, reason="needs a C++ compiler")

each_isa = pytest.mark.parametrize("isa", ISAS)
each_format = pytest.mark.parametrize("format", ["mxfp6_e2m3", "mxfp6_e3m2"])


def mxfp6(x, codes, scales, format, isa=None, used=None):
    bits = FORMATS[format].element.exponent_bits
    return np.asarray(cpu_kernels.mxfp6_matmul(jnp.asarray(x), jnp.asarray(codes), jnp.asarray(scales), bits, isa, used))


def of_leaf(x, leaf, isa=None):
    return mxfp6(x, leaf.arrays["codes"], leaf.arrays["scales"], leaf.format, isa)


def random_weight(n, k, seed=0):
    """Return (codes one a byte, scales): any codes, scales over nine powers of two, some bytes 0."""
    r = np.random.RandomState(seed)
    scales = np.where(r.rand(n, k // 32) < 0.1, 0, r.randint(118, 127, (n, k // 32)))
    return r.randint(0, 64, (n, k)).astype(np.uint8), scales.astype(np.uint8)


def assert_is_definition(y, x, codes, scales, format):
    """As eight-bit activations by the values of one-byte codes, within what adding blocks in float32 may cost."""
    q, factor = rounded(x)
    x = (q * (2 * factor)[..., None]).reshape(len(x), -1)
    element = codes.view(oracle.ELEMENTS[format][0]).astype(np.float64)
    w = element * np.where(scales == 0, 0.0, np.exp2(scales.astype(np.float64) - 127)).repeat(32, 1)
    assert np.all(np.abs(y - x @ w.T) <= 2.0**-20 * (np.abs(x) @ np.abs(w).T) + 1e-36)


@each_isa
@each_format
@pytest.mark.parametrize(("n", "k"), [(13, 544), (1, 32), (3, 96), (7, 256), (50, 2080)])
def test_it_is_its_definition_and_rows_depend_on_nothing_else(isa, format, n, k):
    """K in blocks that are no whole registers, N in no whole tiles."""
    x, (codes, scales) = normal(67, k), random_weight(n, k)
    packed = joined(codes)
    whole = mxfp6(x, packed, scales, format, isa)
    assert_is_definition(whole, x, codes, scales, format)
    for m in rows(n):
        np.testing.assert_array_equal(mxfp6(x[:m], packed, scales, format, isa), whole[:m])
    np.testing.assert_array_equal(mxfp6(x[5:6], packed, scales, format, isa), whole[5:6])
    np.testing.assert_array_equal(mxfp6(x, packed[n // 2 :], scales[n // 2 :], format, isa), whole[:, n // 2 :])
    if n == 13:
        assert_rows_in_use(lambda x, used: mxfp6(x, packed, scales, format, isa, used), x, whole)


@each_isa
@each_format
def test_every_code_in_every_place_is_exact(isa, format):
    """Row r of x picks element r of each row of the weight; row c of the weight has code c + r there."""
    k = 288
    codes = ((np.arange(64)[:, None] + np.arange(k)) % 64).astype(np.uint8)
    scales = np.full((64, k // 32), 127, np.uint8)
    found = mxfp6(np.eye(k, dtype=ml_dtypes.bfloat16), joined(codes), scales, format, isa)
    np.testing.assert_allclose(found, codes.view(oracle.ELEMENTS[format][0]).astype(np.float64).T, rtol=2.0**-22)


@each_isa
@each_format
def test_the_largest_sums_of_a_block_are_exact(isa, format):
    """All codes and all activations at their largest, of either sign: the integers that 16 bits must hold."""
    k, largest = 256, FORMATS[format].element.largest
    scales = np.full((4, k // 32), 127, np.uint8)
    codes = np.array([31, 63, 31, 31], np.uint8)[:, None].repeat(k, 1)
    codes[2, 1::2], codes[3, 2::4] = 63, 63
    for signs in itertools.product((1, -1), repeat=2):
        x = np.tile(np.array(signs), k // 2)[None].astype(ml_dtypes.bfloat16)
        exact = x.astype(np.float64) @ np.where(codes & 32, -largest, largest).T
        np.testing.assert_allclose(mxfp6(x, joined(codes), scales, format, isa), exact, rtol=2.0**-20)


@each_isa
@each_format
def test_the_ends_of_the_scales(isa, format):
    codes, _ = random_weight(16, 96)
    most = 254 - FORMATS[format].element.emax  # of which the largest element is finite
    scales = np.random.RandomState(1).choice([0, 1, 2, 127, most - 1, most], size=(16, 3)).astype(np.uint8)
    scales[0], scales[1] = 0, most
    for scale in (1e-3, 1e-8):
        x = normal(4, 96, scale=scale)
        y = mxfp6(x, joined(codes), scales, format, isa)
        assert_is_definition(y, x, codes, scales, format)
        assert not y[:, 0].any()  # a scale of 0 is one of zero, exactly
    np.testing.assert_array_equal(mxfp6(np.zeros((2, 96), ml_dtypes.bfloat16), joined(codes), scales, format, isa), 0)


@each_isa
@each_format
@pytest.mark.parametrize("where", [0, 600, 1119])
def test_nan_and_infinity_make_nan_of_their_row(isa, format, where):
    x, leaf = normal(6, 1120), quantize(jnp.asarray(normal(9, 1120, seed=1)), format)
    clean = of_leaf(x, leaf, isa)
    x[1, where], x[2, where], x[4, where] = np.nan, np.inf, -np.inf
    y = of_leaf(x, leaf, isa)
    assert np.isnan(y[[1, 2, 4]]).all()
    np.testing.assert_array_equal(y[[0, 3, 5]], clean[[0, 3, 5]])


@each_isa
@each_format
def test_it_reads_nothing_of_other_rows(isa, format):
    """The blocks after a row's last are the next row's: whatever they hold, infinite scales too, counts for nothing."""
    x, (codes, scales) = normal(3, 160), random_weight(6, 160)
    clean = mxfp6(x, joined(codes), scales, format, isa)
    codes[1::2], scales[1::2] = 63, 255
    np.testing.assert_array_equal(mxfp6(x, joined(codes), scales, format, isa)[:, ::2], clean[:, ::2])


@each_format
@pytest.mark.parametrize("k", [70, pytest.param(576, marks=pytest.mark.slow)])
def test_linear_runs_it_for_bfloat16_and_xla_elsewhere(format, k):
    x, leaf = jnp.asarray(normal(3, k)), quantize(jnp.asarray(normal(33, k, seed=1)), format)
    assert product_of(leaf, "bfloat16", "cpu").name == "cpp mxfp6"
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(leaf, jnp.float32), np.float64).T
    assert np.abs(linear(x, leaf, out_dtype=jnp.float32) - exact).max() < 0.02 * np.abs(exact).max()
    np.testing.assert_allclose(linear(x.astype(jnp.float32), leaf, out_dtype=jnp.float32), exact, rtol=1e-5, atol=1e-5)
    assert "mlspecqd_mxfp6_matmul" in jax.jit(linear).lower(x, leaf).as_text()
    assert "mlspecqd_mxfp6_matmul" not in jax.jit(linear).lower(x.astype(jnp.float32), leaf).as_text()
    assert "mlspecqd_" not in jax.jit(linear).trace(x, leaf).lower(lowering_platforms=("tpu",)).as_text()


@each_format
def test_a_weight_takes_six_bits_and_its_scales(format):
    leaf = quantize(jnp.asarray(normal(24, 1024)), format)
    assert 8 * leaf.nbytes / leaf.size == 6.25
    assert split(np.asarray(leaf.arrays["codes"])).shape == leaf.shape


def test_empty_products():
    codes, scales = np.zeros((3, 24), np.uint8), np.zeros((3, 1), np.uint8)
    assert mxfp6(normal(0, 32), codes, scales, "mxfp6_e2m3").shape == (0, 3)
    assert mxfp6(normal(2, 32), codes[:0], scales[:0], "mxfp6_e2m3").shape == (2, 0)
    np.testing.assert_array_equal(mxfp6(normal(2, 0), codes[:, :0], scales[:, :0], "mxfp6_e2m3"), np.zeros((2, 3)))


def test_what_does_not_belong_together_is_refused():
    x, codes, scales = jnp.ones((2, 64), jnp.bfloat16), jnp.ones((3, 48), jnp.uint8), jnp.ones((3, 2), jnp.uint8)
    with pytest.raises(ValueError, match=r"do not belong together; give x \[M, K\], codes \[N, 3K/4\]"):
        cpu_kernels.mxfp6_matmul(x[:, :32], codes, scales, 2)
    with pytest.raises(ValueError, match=r"do not belong together; give x \[M, K\], codes \[N, 3K/4\]"):
        cpu_kernels.mxfp6_matmul(x, jnp.ones((3, 64), jnp.uint8), scales, 2)  # a byte a code
    with pytest.raises(ValueError, match="should be bfloat16, uint8, uint8"):
        cpu_kernels.mxfp6_matmul(x.astype(jnp.float32), codes, scales, 2)
    with pytest.raises(ValueError, match="elements have 4 bits of exponent, but should have 2 or 3"):
        cpu_kernels.mxfp6_matmul(x, codes, scales, 4)
    with pytest.raises(NotImplementedError, match=r"mxfp6_matmul for amx: this machine has .*portable"):
        cpu_kernels.mxfp6_matmul(x, codes, scales, 2, "amx")
