"""The casts to formats whose scales are numbers, against their definitions in float64: scales, codes, searches, bytes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.formats import FORMATS, SCALED, format_of

pytestmark = pytest.mark.usefixtures("compiled_quickly")

QUICK = ("nvfp4", "int4", "uint4_g32", "int8")
formats = pytest.mark.parametrize("format", [format.name for format in SCALED])
quick_formats = pytest.mark.parametrize(
    "format", [pytest.param(format.name, marks=() if format.name in QUICK else pytest.mark.slow) for format in SCALED]
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def weight(n, k, seed=0, dtype=jnp.float32):
    """Rows and groups of different size, and a group of zeros."""
    r = np.random.RandomState(seed)
    w = (
        r.standard_normal((n, k))
        * np.exp2(r.randint(-9, -2, (n, 1)))
        * np.exp2(r.randint(-2, 3, (1, k // 32 + 1)).repeat(32, 1)[:, :k])
    )
    w[0, :32] = 0
    return jnp.asarray(w, dtype)


def grid(f):
    """What an element may be, ascending."""
    if hasattr(f.element, "offset"):
        return np.arange(2**f.bits) - float(f.element.offset)
    values = E2M1 if f.bits == 4 else E4M3
    return np.unique(np.concatenate([-values, values]))


def parts(a):
    """(scale of every element, minimum of every element, in float64) of a stored weight, each [N, K]."""
    f, (n, k) = format_of(a.format), a.shape
    scales = np.asarray(a.arrays["scales"])
    scales = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64) if f.scale == "e4m3" else scales.astype(np.float64)
    if "tensor_scale" in a.arrays:
        scales = scales * float(a.arrays["tensor_scale"][0])
    group = f.group or k
    wide = scales.repeat(f.rows, 0)[:n].repeat(group, 1)[:, :k]
    minima = a.arrays.get("minima")
    return wide, 0 if minima is None else np.asarray(minima, np.float64).repeat(group, 1)[:, :k]


@formats
@pytest.mark.parametrize(("rule", "n", "k"), [("floor", 130, 160), pytest.param("mse", 3, 70, marks=pytest.mark.slow)])
def test_every_element_is_the_nearest_that_its_scale_allows(format, rule, n, k):
    w = weight(n, k)
    a = quantize(w, format, rule)
    scale, minimum = parts(a)
    values, w = np.asarray(dequantize(a, jnp.float32), np.float64), np.asarray(w, np.float64)
    allowed = grid(format_of(format))
    allowed = allowed[1:] if format == "int8" else allowed  # -128 has no counterpart
    distance = np.abs(allowed * scale[..., None] + np.asarray(minimum)[..., None] - w[..., None]).min(-1)
    assert np.all(np.abs(values - w) <= distance * (1 + 1e-5) + 1e-4 * np.abs(scale))


@formats
def test_the_scale_comes_from_the_largest(format):
    """The largest magnitude of a group is kept, to half a step of the scale's own type."""
    w = weight(6, 256)
    a, f = quantize(w, format), format_of(format)
    scale, minimum = parts(a)
    values, w = np.asarray(dequantize(a, jnp.float32), np.float64), np.asarray(w, np.float64)
    if f.minimum:
        most = w.reshape(6, -1, f.group).max(-1).repeat(f.group, 1)
        np.testing.assert_allclose(np.asarray(minimum) + 15 * scale, most, atol=np.abs(most).max() * 2**-9)
    else:
        size = f.group or 256
        blocks = np.abs(w).reshape(6, -1, size).max(-1)
        blocks = blocks.max(0, keepdims=True).repeat(6, 0) if f.rows > 1 else blocks
        largest = {"int8": 127.0}.get(format, np.abs(grid(f)).max())
        error = {"e4m3": 2.0**-4, "float16": 2.0**-11, "float32": 2.0**-22}[f.scale]
        floor = float(a.arrays["tensor_scale"][0]) * 2.0**-10 if f.scale == "e4m3" else 2.0**-25  # half of the least scale
        np.testing.assert_allclose(np.abs(scale), (blocks / largest).repeat(size, 1), rtol=error, atol=floor)
    assert np.all(values[w == 0][:32] == 0) or f.minimum


@quick_formats
def test_a_search_is_never_worse_and_mostly_better(format):
    w = weight(16, 512, dtype=jnp.bfloat16)
    f = FORMATS[format]
    error = {}
    for rule in ("floor", "mse"):
        wrong = (np.asarray(dequantize(quantize(w, format, rule), jnp.float32)) - np.asarray(w, np.float32)) ** 2
        error[rule] = (
            wrong.reshape(-1, wrong.shape[1] if f.group is None else f.group).sum(-1) if f.rows == 1 else wrong.sum()[None]
        )
    assert np.all(error["mse"] <= error["floor"] * (1 + 1e-5))
    assert error["mse"].sum() <= (0.97 if f.bits == 4 else 1.0) * error["floor"].sum()


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8_e4m3"])
def test_a_search_of_exponents_is_never_worse(format):
    w = weight(16, 512, dtype=jnp.bfloat16)
    error = {}
    for rule in ("floor", "ceil", "mse"):
        wrong = (np.asarray(dequantize(quantize(w, format, rule), jnp.float32)) - np.asarray(w, np.float32)) ** 2
        error[rule] = wrong.reshape(16, -1, 32).sum(-1)
    assert np.all(error["mse"] <= np.minimum(error["floor"], error["ceil"]) * (1 + 1e-6))
    assert error["mse"].sum() < error["floor"].sum()


@formats
def test_it_takes_the_bits_that_it_says(format):
    bits = {"nvfp4": 4.5, "int4": 4.5, "int4_g64": 4.25, "int4_g128": 4.125, "uint4_g32": 5.0, "uint4_g128": 4.25}
    bits |= {"int8": 8 + 32 / 1024, "fp8_e4m3": 8 + 32 / 1024, "fp8_e4m3_128x128": 8 + 32 / 128**2}
    a = quantize(weight(256, 1024), format)
    assert 8 * (a.nbytes - a.arrays.get("tensor_scale", jnp.zeros(0)).nbytes) == bits[format] * a.size


@formats
def test_zeros_stay_zeros_and_what_is_not_finite_is_refused(format):
    np.testing.assert_array_equal(dequantize(quantize(jnp.zeros((3, 70)), format), jnp.float32), 0)
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match=r"shape \[3, 70\] holds NaN or infinity"):
            quantize(jnp.ones((3, 70)).at[1, 69].set(bad), format)


@quick_formats
def test_under_jit_it_is_the_same(format):
    w = weight(7, 200, dtype=jnp.bfloat16)
    one, other = quantize(w, format), jax.jit(lambda w: quantize(w, format))(w)
    for role, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[role])


def test_an_order_of_columns_and_scales_of_rows_are_undone():
    """What files of others may hold: columns in another order, and multiples of rows and of the whole."""
    import dataclasses

    from mlspecqd_jax.weights.products import multiply

    w = weight(6, 96)
    a = quantize(w, "int4")
    order = np.random.RandomState(0).permutation(96)
    extra = {"order": jnp.asarray(order, jnp.int32), "row_scale": jnp.arange(1.0, 7.0), "tensor_scale": jnp.full((1,), 0.5)}
    b = dataclasses.replace(a, arrays=a.arrays | extra)
    expected = np.empty((6, 96), np.float32)
    expected[:, order] = np.asarray(dequantize(a, jnp.float32)) * np.arange(1, 7)[:, None] * 0.5
    np.testing.assert_allclose(dequantize(b, jnp.float32), expected, rtol=1e-6)
    x = jnp.asarray(np.random.RandomState(1).standard_normal((3, 96)), jnp.float32)
    np.testing.assert_allclose(multiply(x, b), np.asarray(x) @ expected.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int8_g32", "uint8_g64", "int4_g48", "uint4_g16"])
def test_groups_of_other_sizes_have_names_too(name):
    f, w = format_of(name), weight(4, 192)
    assert name.endswith(f"_g{f.group}")
    assert f.minimum == name.startswith("u")
    relative = np.linalg.norm(np.asarray(dequantize(quantize(w, name), jnp.float32) - w)) / np.linalg.norm(np.asarray(w))
    assert relative < (0.01 if f.bits == 8 else 0.12)


@pytest.mark.parametrize("name", ["int4_g0", "int4_g20", "int5", "uint8", "int4_g", "float4", "int4_g32 "])
def test_what_is_no_format_is_refused(name):
    with pytest.raises(ValueError, match="is not a format for weights; give one of mxfp4"):
        format_of(name)


def test_rules_of_mx_are_refused_for_others():
    with pytest.raises(ValueError, match="the scale rule 'ceil' is of MX formats alone, and int4 is none; give 'floor' or 'mse'"):
        quantize(jnp.ones((2, 32)), "int4", "ceil")
