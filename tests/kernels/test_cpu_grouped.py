"""The C++ products of NVFP4 and of integers: their definition in every instruction set of this machine, for every code."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_cpu_kernels import ROOT, normal, rounded, rows  # noqa: F401
from windows import assert_rows_in_use

import cpu_kernels
from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.cpu_products import GROUPED
from mlspecqd_jax.weights.formats import format_of
from mlspecqd_jax.weights.products import multiply, product_of
from mlspecqd_jax.weights.quantized_array import QuantizedArray

ISAS = cpu_kernels.isas("int4_matmul")

pytestmark = pytest.mark.skipif(not ISAS, reason="needs a C++ compiler")
each_isa = pytest.mark.parametrize("isa", ISAS)
OF_FOUR = ["nvfp4", "int4", "int4_g128", "uint4_g32", "uint4_g64", "uint4_g4096"]
OF_EIGHT = ["int8", "int8_g16", "int8_g32", "int8_g64", "int8_g4096", "uint8_g16", "uint8_g32", "uint8_g128"]
each_format = pytest.mark.parametrize("format", OF_FOUR + OF_EIGHT)


def grouped(x, leaf, isa=None, used=None):
    bits = format_of(leaf.format).bits
    return np.asarray(cpu_kernels.grouped_matmul(jnp.asarray(x), **leaf.core, isa=isa, used=used, bits=bits))


def values(leaf):
    """What the arrays of a product stand for, float64 [N, K32]."""
    core = QuantizedArray(leaf.core, (leaf.shape[0], leaf.shape[1] + -leaf.shape[1] % 32), leaf.format)
    return np.asarray(dequantize(core, jnp.float32), np.float64)


def definition(x, leaf):
    """Y by the definition, in float64, and the sum of the magnitudes of its terms."""
    q, factor = rounded(x)
    x = (q * (2 * factor)[..., None]).reshape(len(x), -1)
    terms = np.abs(x) @ np.abs(values(leaf)).T
    return x @ values(leaf).T, terms


def random_leaf(n, k, format, seed=0):
    """Return a weight of any bytes: every code, scales of both signs where there are any, and zeros among them."""
    f, r = format_of(format), np.random.RandomState(seed)
    groups = 1 if f.group is None else -(-k // f.group)
    codes = r.randint(0, 256, (n, f.code_bytes(k))).astype(np.uint8)
    if f.scale == "e4m3":
        scales = np.where(r.rand(n, groups) < 0.1, 0, r.randint(1, 0x7F, (n, groups))).astype(np.uint8)
    else:
        scales = np.where(r.rand(n, groups) < 0.1, 0, r.standard_normal((n, groups))).astype(f.scale)
        if f.scale == "float16":
            scales[0, 0] = np.float16(6e-8)  # a subnormal number
    arrays = {"codes": codes, "scales": scales}
    if f.minimum:
        arrays["minima"] = r.standard_normal((n, groups)).astype(np.float16)
    return QuantizedArray({role: jnp.asarray(array) for role, array in arrays.items()}, (n, k), format)


@each_isa
@each_format
@pytest.mark.parametrize(("n", "k"), [pytest.param(13, 544, marks=pytest.mark.slow), (3, 96)])
def test_it_is_its_definition_and_rows_depend_on_nothing_else(isa, format, n, k):
    x, leaf = normal(67, k), random_leaf(n, k, format)
    whole = grouped(x, leaf, isa)
    expected, terms = definition(x, leaf)
    assert np.all(np.abs(whole - expected) <= 2.0**-20 * terms + 1e-30)
    for m in rows(n) if format in ("nvfp4", "int8", "int8_g16") else (1, 3, 8):
        np.testing.assert_array_equal(grouped(x[:m], leaf, isa), whole[:m])
    np.testing.assert_array_equal(grouped(x[5:6], leaf, isa), whole[5:6])
    if n == 13:
        assert_rows_in_use(lambda x, used: grouped(x, leaf, isa, used), x, whole)


@each_isa
@each_format
def test_every_element_is_exact(isa, format):
    """Row r of x picks element r of each row of the weight."""
    leaf = random_leaf(8, 256, format, seed=1)
    found, exact = grouped(np.eye(256, dtype=ml_dtypes.bfloat16), leaf, isa), values(leaf).T
    if "minima" in leaf.arrays:  # added after the product
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_allclose(found, exact, rtol=2.0**-22, atol=1e-30)


@each_isa
@each_format
def test_nan_and_infinity_make_nan_of_their_row(isa, format):
    x, leaf = normal(6, 1120), random_leaf(9, 1120, format)
    clean = grouped(x, leaf, isa)
    x[1, 600], x[2, 600], x[4, 600] = np.nan, np.inf, -np.inf
    y = grouped(x, leaf, isa)
    assert np.isnan(y[[1, 2, 4]]).all()
    np.testing.assert_array_equal(y[[0, 3, 5]], clean[[0, 3, 5]])


@each_format
@pytest.mark.parametrize("k", [70, *(pytest.param(k, marks=pytest.mark.slow) for k in (576, 608))])
def test_linear_runs_it_on_weights_as_they_are_cast(format, k):
    """K that is no multiple of a group, or of 32: the last group is shorter."""
    x, leaf = jnp.asarray(normal(3, k)), quantize(jnp.asarray(normal(33, k, seed=1)), format)
    assert product_of(leaf, "bfloat16", "cpu").name == "cpp grouped"
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(leaf, jnp.float32), np.float64).T
    found = np.asarray(multiply(x, leaf))
    assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def test_groups_of_powers_of_two_have_it():
    for format in GROUPED:
        assert product_of(random_leaf(3, 96, format), "bfloat16", "cpu").name == "cpp grouped"
    for format in ("int4_g48", "int4_g16", "uint4_g96", "int8_g48", "uint8_g240"):
        assert product_of(random_leaf(3, 96, format), "bfloat16", "cpu").name == "cpp decoded"


def test_what_does_not_belong_together_is_refused():
    x, leaf = jnp.ones((2, 64), jnp.bfloat16), random_leaf(3, 64, "uint4_g32")
    with pytest.raises(ValueError, match="do not belong together"):
        cpu_kernels.grouped_matmul(x[:, :32], **leaf.core)
    with pytest.raises(ValueError, match="do not belong together"):
        cpu_kernels.grouped_matmul(x, leaf.arrays["codes"], leaf.arrays["scales"], leaf.arrays["minima"][:, :1])
    with pytest.raises(ValueError, match="do not belong together"):
        cpu_kernels.grouped_matmul(x.astype(jnp.float32), **leaf.core)
    with pytest.raises(ValueError, match="do not belong together"):
        cpu_kernels.grouped_matmul(x, **leaf.core, bits=8)
    with pytest.raises(ValueError, match="do not belong together"):
        cpu_kernels.grouped_matmul(x, **random_leaf(3, 64, "int8_g32").core)
