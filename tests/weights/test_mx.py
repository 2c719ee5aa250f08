"""MX formats (C2): bit for bit the specification's codes and scales, for every BF16 value, every format and every scale rule."""

import jax
import jax.numpy as jnp
import ml_dtypes
import mx_oracle as oracle
import numpy as np
import pytest
import six_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.formats import MX
from mlspecqd_jax.weights.mx import SCALE_RULES, stored_codes
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import mx_decode, unpacked

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FORMATS = {format.name: format for format in MX}
formats = pytest.mark.parametrize("format", list(FORMATS))
rules = pytest.mark.parametrize("rule", SCALE_RULES)


def finite_values(dtype) -> np.ndarray:
    """Every finite value of a 16-bit type."""
    values = np.arange(2**16, dtype=np.uint16).view(dtype)
    return values[np.isfinite(values.astype(np.float32))]


def blocks_of(values: np.ndarray) -> np.ndarray:
    """[2N, 128] that holds every value twice: among its neighbours, and among values of all magnitudes."""
    values = values[np.argsort(values.astype(np.float32), kind="stable")]
    return np.concatenate([values, values[np.random.RandomState(0).permutation(len(values))]]).reshape(-1, 128)


def codes_of(a) -> np.ndarray:
    """Codes [N, K32], one a byte."""
    codes = np.asarray(a.arrays["codes"])
    if FORMATS[a.format].bits == 6:
        return six_bits.split(codes)
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1) if a.format == "mxfp4" else codes


def assert_as_the_oracle(w, format, rule):
    a = quantize(w, format, rule)
    codes, scales = oracle.quantize(w, format, rule)
    np.testing.assert_array_equal(a.arrays["scales"], scales)
    np.testing.assert_array_equal(codes_of(a), codes)
    return a


def mxfp4(values) -> tuple[list[int], int]:
    """Codes and scale byte of one block, as far as values are given."""
    a = quantize(jnp.asarray([values], jnp.bfloat16))
    return codes_of(a)[0, : len(values)].tolist(), int(a.arrays["scales"][0, 0])


@pytest.mark.parametrize("format", ["mxfp4", *(pytest.param(f, marks=pytest.mark.slow) for f in FORMATS if f != "mxfp4")])
@rules
def test_every_bf16_value(format, rule):
    a = assert_as_the_oracle(blocks_of(finite_values(ml_dtypes.bfloat16)), format, rule)
    assert np.asarray(a.arrays["scales"]).min() == 0
    assert np.asarray(a.arrays["scales"]).max() >= 254 - FORMATS[format].element.emax


@formats
def test_every_f16_value(format):
    assert_as_the_oracle(blocks_of(finite_values(np.float16)), format, "floor")


@formats
@rules
def test_f32_values(format, rule):
    """Of all magnitudes, in blocks of like and unlike ones; and one float32 below, at and above each place where a rule turns."""
    random = np.random.RandomState(1)
    bits = random.randint(0, 2**32, (64, 128), dtype=np.uint32)
    fraction, exponents = bits & 0x807FFFFF, random.randint(1, 255, (64, 4), dtype=np.uint32).repeat(32, 1)
    lower = np.maximum(exponents.astype(np.int64) - random.randint(0, 30, exponents.shape), 0).astype(np.uint32)
    w = np.concatenate([bits, fraction | exponents << 23, fraction | lower << 23, fraction]).view(np.float32)
    turns = np.array([1, 1.5, 1.75, 1.875, 1.9375, 2], np.float32)
    amax = np.stack([np.nextafter(turns, 0), turns, np.nextafter(turns, np.float32(4))]).reshape(-1, 1)
    near_turns = amax * np.tile(np.linspace(-1, 1, 32, dtype=np.float32), 4)
    assert_as_the_oracle(np.concatenate([np.where(np.isfinite(w), w, 0), near_turns]), format, rule)


def test_golden_ties():
    halves = [4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]  # 4 makes the scale 1; 5 saturates nothing
    assert mxfp4(halves) == ([6, 0, 2, 2, 4, 4, 6, 6], 127)
    assert mxfp4([-x for x in halves]) == ([14, 8, 10, 10, 12, 12, 14, 14], 127)
    just_above = [4, 0.251, 0.754, 1.26, 1.76, 2.52, 3.52, 5.03]
    assert mxfp4(just_above) == ([6, 1, 2, 3, 4, 5, 6, 7], 127)


def test_the_largest_values_of_a_block_are_clipped():
    assert mxfp4([7.96875, -7, 6, 4]) == ([7, 15, 7, 6], 127)
    w = np.array([[7.96875, 4]], np.float32)
    np.testing.assert_array_equal(dequantize(quantize(w, scale_rule="floor"), jnp.float32), [[6, 4]])
    for rule in ("ceil", "rceil", "even"):
        np.testing.assert_array_equal(dequantize(quantize(w, scale_rule=rule), jnp.float32), [[8, 4]])


def test_a_block_of_zeros():
    assert mxfp4([0.0, 0.0]) == ([0, 0], 0)
    a = quantize(jnp.zeros((3, 64), jnp.float16))
    assert not any(np.any(array) for array in a.arrays.values())
    assert not np.any(dequantize(a))


def test_signs_of_zeros_and_of_what_becomes_zero():
    assert mxfp4([4, 0.0, -0.0, -0.1, 0.1])[0] == [6, 0, 8, 8, 0]


def test_bf16_extremes():
    largest, least = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), 2.0**-133
    assert mxfp4([largest, -largest]) == ([7, 15], 252)
    assert mxfp4([least, -least]) == ([0, 8], 0)
    assert mxfp4([2.0**-124, 2.0**-126]) == ([6, 2], 1)  # the least block that is not taken for zero
    assert mxfp4([2.0**-125, 2.0**-127]) == ([6, 2], 0)
    np.testing.assert_array_equal(dequantize(quantize(jnp.full((1, 32), 2.0**-125, jnp.float32))), 0)


@pytest.mark.parametrize("k", [1, 33, 172])
def test_padding(k):
    w = np.random.RandomState(k).standard_normal((5, k)).astype(np.float32)
    padded = np.pad(w, ((0, 0), (0, -k % 32)))
    for format in ("mxfp4", "mxfp6_e3m2"):
        a, whole = assert_as_the_oracle(w, format, "floor"), quantize(padded, format)
        assert a.shape == (5, k)
        assert a.size == 5 * k
        assert a.nbytes == padded.size * FORMATS[format].bits // 8 + padded.size // 32
        np.testing.assert_array_equal(codes_of(a), codes_of(whole))
        np.testing.assert_array_equal(dequantize(a), dequantize(whole)[:, :k])
        assert dequantize(a).dtype == jnp.bfloat16


@formats
def test_every_code_at_every_scale(format):
    """Decoded values are exact in bfloat16 down to its least normal number."""
    count = len(oracle.table(format))
    codes = np.concatenate([np.arange(count), np.arange(count) | 1 << FORMATS[format].bits - 1])
    codes = np.resize(codes, (255, 256)).astype(np.uint8)
    scales = np.arange(255, dtype=np.uint8)[:, None].repeat(8, 1)
    stored = codes[:, 0::2] | codes[:, 1::2] << 4 if format == "mxfp4" else codes
    stored = six_bits.joined(codes) if format.startswith("mxfp6") else stored
    f = FORMATS[format].element
    decoded = mx_decode(jnp.asarray(stored), jnp.asarray(scales), f.exponent_bits, f.mantissa_bits)
    expected = oracle.dequantize(codes, scales, format)
    np.testing.assert_array_equal(np.asarray(decoded, np.float64), expected)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_views_are_what_dequantize_gives(format):
    a = quantize(np.random.RandomState(2).standard_normal((6, 160)).astype(np.float32), format)
    assert a.elements.dtype.name == oracle.ELEMENTS[format][0].__name__
    assert a.elements.shape == (6, 160)
    assert a.scales_e8m0.dtype == jnp.float8_e8m0fnu
    values = np.asarray(a.elements).astype(np.float32) * np.asarray(a.scales_e8m0).astype(np.float32).repeat(32, 1)
    np.testing.assert_array_equal(dequantize(a, jnp.float32), values)


def test_six_bit_elements_have_no_view():
    with pytest.raises(ValueError, match=r"no type for the elements of mxfp6_e2m3; read \.arrays\['codes'\]"):
        quantize(jnp.ones((1, 32)), "mxfp6_e2m3").elements  # noqa: B018


def test_elements_are_the_cast_to_float4():
    """At scale 1 the elements are ml_dtypes' cast of the values, signs of zeros included."""
    values = finite_values(ml_dtypes.bfloat16)
    values = values[np.abs(values.astype(np.float32)) < 8]
    values = np.resize(values, (-(-len(values) // 31), 31))
    w = np.concatenate([np.full((len(values), 1), 4, values.dtype), values], axis=1)
    a = quantize(w)
    assert np.all(np.asarray(a.arrays["scales"]) == 127)
    np.testing.assert_array_equal(codes_of(a), w.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    arrays(np.float32, (2, 64), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.sampled_from(list(FORMATS)),
    st.sampled_from(SCALE_RULES),
)
def test_any_weights(w, format, rule):
    assert_as_the_oracle(w, format, rule)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(arrays(np.float32, (2, 64), elements=st.floats(-(2.0**100), 2.0**100, width=32)), st.sampled_from(list(FORMATS)))
def test_quantizing_what_was_quantized_changes_nothing(w, format):
    """Under `floor`; the smallest blocks are left out, whose elements are flushed to zero."""
    w = np.where(np.abs(w) < 2.0**-80, 0, w)
    once = dequantize(quantize(w, format), jnp.float32)
    np.testing.assert_array_equal(dequantize(quantize(once, format), jnp.float32), once)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(
    arrays(np.float32, (2, 64), elements=st.floats(-1, 1, width=32)), st.sampled_from(list(FORMATS)), st.sampled_from(SCALE_RULES)
)
def test_what_it_commutes_with(w, format, rule):
    """Signs and the order of blocks and of elements in them pass through, and a power of two only moves the scales."""
    w = np.where(np.abs(w) < 2.0**-60, 0, w)
    once = np.asarray(dequantize(quantize(w, format, rule), jnp.float32))
    np.testing.assert_array_equal(dequantize(quantize(-w[:, ::-1], format, rule), jnp.float32), -once[:, ::-1])
    np.testing.assert_array_equal(dequantize(quantize(w * 2.0**20, format, rule), jnp.float32), once * 2.0**20)


def test_under_jit_and_as_pytrees():
    w = jnp.asarray(np.random.RandomState(3).standard_normal((3, 70)), jnp.bfloat16)
    for format in ("mxfp4", "mxfp8_e5m2"):
        a = quantize(w, format)
        traced = jax.jit(quantize, static_argnums=1)(w, format)
        assert jax.tree.structure(traced) == jax.tree.structure(a)
        for ours, theirs in zip(jax.tree.leaves(traced), jax.tree.leaves(a), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert jax.eval_shape(lambda w, f=format: quantize(w, f), w).shape == (3, 70)
        empty = jax.tree.map(lambda _: None, a)
        assert (empty.arrays, empty.shape, empty.format) == ({"codes": None, "scales": None}, (3, 70), format)
        assert (empty.product, empty.chip, tuple(empty.spec)) == ("stored", None, (None, None))
        assert isinstance(a, QuantizedArray)


def test_formats_are_those_of_the_specification():
    """Section 5.2: groups of 32, scales in E8M0, and elements of these sizes; codes take no bits but their own."""
    for name, f in FORMATS.items():
        assert (f.name, f.group, f.scale) == (name, 32, "e8m0")
        assert f.bits == ml_dtypes.finfo(oracle.ELEMENTS[name][0]).bits
        assert f.element.largest == oracle.table(name)[-1]
        assert f.element.mantissa_bits == oracle.ELEMENTS[name][1]
        assert f.code_bytes(96) * 8 == 96 * f.bits


@pytest.mark.parametrize("format", ["mxfp6_e2m3", "mxfp6_e3m2"])
def test_codes_of_six_bits_are_packed_and_unpacked(format):
    """Every code in every place; the bytes are those of the layout, and those of a block depend on that block alone."""
    codes = (np.arange(64)[:, None] + np.arange(96)).astype(np.uint8) % 64
    stored = stored_codes(jnp.asarray(codes, jnp.int32), FORMATS[format])
    assert stored.dtype == jnp.uint8
    np.testing.assert_array_equal(stored, six_bits.joined(codes))
    np.testing.assert_array_equal(six_bits.split(np.asarray(stored)), codes)
    np.testing.assert_array_equal(unpacked(stored, 6), codes)
    np.testing.assert_array_equal(stored_codes(jnp.asarray(codes[:, 32:64], jnp.int32), FORMATS[format]), stored[:, 24:48])


def test_a_block_of_six_bits_by_hand():
    """Element 0 is the sign alone, element 1 the exponent's first bit, element 9 both, element 31 all ones, the others zero."""
    codes = np.zeros((1, 32), np.int32)
    codes[0, [0, 1, 9, 31]] = 0b100000, 0b010000, 0b110000, 0b111111
    expected = [0] * 15 + [0xF0] + [0b10, 0b1101, 0, 0, 0, 0, 0, 0b11000000]
    assert stored_codes(jnp.asarray(codes), FORMATS["mxfp6_e3m2"])[0].tolist() == expected


def test_temporaries_are_small():
    """A quarter of the weight and less: the f32 form is never in memory."""
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    for format in ("mxfp4", "mxfp8_e4m3"):
        compiled = jax.jit(quantize, static_argnums=1).lower(w, format).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 1024 * 1024 * 2 / 4


@pytest.mark.parametrize(
    ("w", "arguments", "words"),
    [
        (jnp.ones((2, 32)), {"format": "mxfp5"}, "'mxfp5' is not a format for weights; give one of mxfp4, mxfp6_e2m3"),
        (jnp.ones((2, 32)), {"scale_rule": "up"}, "'up' is not a scale rule; give one of floor, ceil, rceil, even"),
        (jnp.ones((2, 3, 32)), {}, r"shape \[2, 3, 32\] cannot be quantized; give a matrix"),
        (jnp.ones((32,)), {}, r"shape \[32\] cannot"),
        (jnp.ones((2, 32), jnp.int8), {}, "dtype int8 cannot be quantized; cast it to one of bfloat16"),
        (np.ones((2, 32)), {}, "dtype float64 cannot"),
        ([[1.0]], {}, "dtype list cannot"),
        (jnp.ones((2, 40)).at[1, 3].set(jnp.nan), {}, r"shape \[2, 40\] holds NaN or infinity"),
        (jnp.ones((2, 40)).at[1, 39].set(-jnp.inf), {"format": "mxfp8_e4m3"}, "holds NaN or infinity"),
    ],
)
def test_what_cannot_be_quantized_is_refused(w, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        quantize(w, **arguments)
    assert len(str(caught.value).splitlines()) == 1
