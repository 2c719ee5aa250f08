"""The kernels for chips that are told what codes and scales stand for, interpreted: every format, of one weight and of experts."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.formats import FORMATS, format_of
from mlspecqd_jax.weights.layouts import arrange
from mlspecqd_jax.weights.products import multiply_experts
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import OF_EXPERTS, OF_PLAIN_EXPERTS, decode, element_values, gpu_tables
from pallas_kernels.reference import number_of_scale
from pallas_kernels.tables import FORMATS as READ
from pallas_kernels.tables import is_integer, numbers, small_floats

pytestmark = pytest.mark.usefixtures("compiled_quickly")
slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
PRODUCTS = {product.name: product for product in (*OF_EXPERTS, *OF_PLAIN_EXPERTS)}
CHIPS = {"tpu": "TPU v5 lite", "gpu": "sm_90"}
OTHERS = ("int8_g16", "uint8_g256", "int4_g16")  # of files of others
SIMULATOR = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager", uninitialized_memory="nan")


def stored(format, n, k, seed=0):
    """Return a weight [N, K] as it is stored: in each column every code, row by row, under random scales; FP8's NaN left out."""
    f, random = format_of(format), np.random.RandomState(seed)
    codes = (np.arange(n)[:, None] * 5 + np.arange(k)[None] * 37 + 3) % 2**f.bits
    if f.bits == 8 and not is_integer(f):
        codes = np.where(codes & 0x7C == 0x7C, 1, codes)
    groups = (-(-n // f.rows), -(-k // (f.group or k)))
    scales = {
        "e8m0": random.randint(118, 127, groups).astype(np.uint8),
        "e4m3": random.randint(0, 0x7F, groups).astype(np.uint8),
    }.get(f.scale, random.uniform(-2, 2, groups).astype("float16" if f.scale == "float16" else "float32"))
    arrays = {"codes": packed(codes, f.bits), "scales": scales}
    if f.minimum:
        arrays["minima"] = random.uniform(-8, 0, groups).astype(np.float16)
    return {role: jnp.asarray(array) for role, array in arrays.items()}


def packed(codes, bits):
    """Codes [N, K] as `formats` says that they lie."""
    if bits == 8:
        return codes.astype(np.uint8)
    if bits == 4:
        return (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    blocks = codes.reshape(len(codes), -1, 32)
    lower = blocks[:, :, :16] & 15 | (blocks[:, :, 16:] & 15) << 4
    upper = sum((blocks[:, :, 8 * f : 8 * f + 8] >> 4) << 2 * f for f in range(4))
    return np.concatenate([lower, upper], axis=2).reshape(len(codes), -1).astype(np.uint8)


def product_of(kernel, x, arrays, format, n, interpret=True, **parts):
    """x [M, K] times a weight, by the kernel of that name, arranged for it."""
    product, f = PRODUCTS[kernel], format_of(format)
    arranged = product.arrange(**arrays, format=f, **parts)
    assert {role: array.ndim for role, array in arranged.items()} == {role: len(product.axes[role]) for role in arranged}
    return np.asarray(product.run(x, arranged, n=n, chip=CHIPS[kernel[:3]], format=f, interpret=interpret))


def assert_near(found, x, w, slack=2.0**-21):
    x, w = (np.asarray(array, np.float64) for array in (x, w))
    assert found.shape == (len(x), len(w))
    assert np.all(np.abs(found - x @ w.T) <= slack * (np.abs(x) @ np.abs(w).T) + 1e-30)


FIRST = (("tpu table", "nvfp4"), ("gpu table", "mxfp6_e3m2"))  # the others take their time
ALIKE = ("int4_g64", "int4_g128", "uint4_g128", "uint8_g256")  # others but for the size of their groups
CASES = [
    pytest.param(*case, marks=() if case in FIRST else (slow, exhaustive) if case[1] in ALIKE else slow, id="-".join(case))
    for case in itertools.product(("tpu table", "gpu table"), (*FORMATS, *OTHERS))
]


@pytest.mark.parametrize(("kernel", "format"), CASES)
def test_every_code(kernel, format):
    """Rows that pick one element each find it exactly; and what is no number stays in its row."""
    f, n, k = format_of(format), 256, 288
    arrays = stored(format, n, k)
    w = np.asarray(decode(arrays, f, jnp.float32))[:n, :k]
    columns = np.arange(12) * 23 + 7
    x = np.random.RandomState(1).standard_normal((16, k))
    x[:12] = 0
    x[np.arange(12), columns] = 1
    x[12, 40], x[13, 100] = np.nan, np.inf
    x = jnp.asarray(x, jnp.bfloat16)
    found = product_of(kernel, x, arrays, format, n)
    if f.minimum:
        np.testing.assert_allclose(found[:12], w.T[columns], rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(found[:12], w.T[columns])
    assert np.isnan(found[12]).all()
    assert not np.isfinite(found[13]).any()
    assert_near(found[14:], x[14:], w)
    assert set(READ) >= {*FORMATS, *OTHERS}


@pytest.mark.parametrize(
    ("kernel", "format", "n", "k", "m"),
    [
        ("tpu table", "int4_g64", 50, 96, 3),
        pytest.param("gpu table", "fp8_e4m3_128x128", 130, 160, 17, marks=slow),
        pytest.param("tpu table", "fp8_e4m3_128x128", 130, 160, 17, marks=slow),
        pytest.param("tpu table", "int8", 1, 32, 1, marks=slow),
        pytest.param("tpu table", "mxfp6_e2m3", 200, 1312, 130, marks=slow),
        pytest.param("tpu table", "nvfp4", 257, 96, 40, marks=(slow, exhaustive)),
        pytest.param("gpu table", "nvfp4", 70, 2080, 70, marks=slow),
        pytest.param("gpu table", "int8", 1, 32, 1, marks=slow),
    ],
)
def test_odd_sizes(kernel, format, n, k, m):
    """In a wide window the TPU's kernel rounds weights that it scales, as the definition does."""
    arrays = stored(format, n, k)
    f = format_of(format)
    x = jnp.asarray(np.random.RandomState(2).standard_normal((m, k)), jnp.bfloat16)
    rounds = kernel.startswith("tpu") and m > 16 and (f.group or 128) < 128 and f.scale != "e8m0"
    w = decode(arrays, f, jnp.bfloat16 if rounds else jnp.float32)[:n, :k]
    assert_near(product_of(kernel, x, arrays, format, n), x, w)


@slow
@pytest.mark.parametrize(("kernel", "few", "many"), [("tpu table", 1, 8), ("tpu table", 17, 128), ("gpu table", 1, 16)])
def test_a_row_does_not_depend_on_how_many_there_are(kernel, few, many):
    arrays = stored("int4", 70, 352)
    x = jnp.asarray(np.random.RandomState(3).standard_normal((many, 352)), jnp.bfloat16)
    whole = product_of(kernel, x, arrays, "int4", 70)
    np.testing.assert_array_equal(product_of(kernel, x[:few], arrays, "int4", 70), whole[:few])


@slow
def test_float16_rows():
    arrays = stored("mxfp8_e5m2", 64, 96)
    x = jnp.asarray(np.random.RandomState(4).standard_normal((3, 96)), jnp.float16)
    assert_near(product_of("gpu table", x, arrays, "mxfp8_e5m2", 64), x, decode(arrays, format_of("mxfp8_e5m2"), jnp.float32))


@slow
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_without_subnormals(format):
    arrays, x = stored(format, 40, 96), jnp.asarray(np.random.RandomState(5).standard_normal((3, 96)), jnp.bfloat16)
    found = product_of("tpu table without subnormals", x, arrays, format, 40)
    assert_near(found, x, decode(arrays, format_of(format), jnp.float32))


E, N, K = 5, 48, 128
CHOSEN = np.array([[3, 0], [1, -1], [-1, -1], [4, 3], [0, 3], [3, 1]], np.int32)  # expert 2 by nobody


def experts_of(kernel, format):
    """Return (the leaf of all experts' weights, arranged; those weights [E, N, K]), those of expert 2 being no numbers."""
    w = jnp.asarray(np.random.RandomState(6).standard_normal((E * N, K)), jnp.bfloat16)
    spoilt = slice(2 * N, 3 * N)
    if format is None:
        return w.at[spoilt].set(jnp.nan), np.asarray(w, np.float64).reshape(E, N, K)
    leaf, f = quantize(w, format), format_of(format)
    values = np.asarray(decode(leaf.core, f, jnp.float32), np.float64)
    bad = 255 if leaf.arrays["scales"].dtype == jnp.uint8 else jnp.nan
    leaf = dataclasses.replace(leaf, arrays=leaf.arrays | {"scales": leaf.arrays["scales"].at[spoilt].set(bad)})
    return arrange(leaf, kernel, CHIPS[kernel[:3]], dtype=jnp.bfloat16, experts=E), values.reshape(E, N, K)


def multiplied(kernel, x, experts, leaf, interpret=True):
    experts = jnp.asarray(experts)
    if isinstance(leaf, QuantizedArray):
        return np.asarray(multiply_experts(x, leaf, experts, E, interpret=interpret))
    about = {"e": E, "n": N, "chip": CHIPS[kernel[:3]], "format": None, "interpret": interpret}
    return np.asarray(PRODUCTS[kernel].by_experts(x, experts, {"weight": leaf}, **about))


@pytest.mark.parametrize(
    ("kernel", "format", "each"),
    [
        ("tpu table", "mxfp4", 2),
        ("gpu table", "mxfp4", 1),
        ("tpu experts", None, 1),
        ("gpu experts", None, 2),
        *(pytest.param("tpu table", format, 2, marks=slow) for format in ("uint4_g32", "int8")),
        *(pytest.param("gpu table", format, 2, marks=slow) for format in ("mxfp4", "int8", "mxfp6_e3m2")),
        pytest.param("tpu table", "mxfp6_e2m3", 2, marks=(slow, exhaustive)),
        pytest.param("tpu table", "mxfp4", 1, marks=slow),
        pytest.param("tpu experts", None, 2, marks=slow),
        pytest.param("gpu experts", None, 1, marks=slow),
    ],
)
def test_a_row_is_multiplied_by_its_expert_s_weight(kernel, format, each):
    """Those of an expert that nobody chose are not read, and what rows without an expert are given is not either."""
    leaf, w = experts_of(kernel, format)
    x = np.random.RandomState(7).standard_normal((len(CHOSEN), each, K))
    x = np.where((CHOSEN >= 0)[:, :each, None] | (CHOSEN[:, :1, None] >= 0) & (each == 1), x, np.nan)
    x = jnp.asarray(x, jnp.bfloat16)
    found = multiplied(kernel, x, CHOSEN, leaf)
    for (t, c), e in np.ndenumerate(CHOSEN):
        if e >= 0:
            assert_near(found[t, c][None], x[t, min(c, each - 1)][None], w[e])


@slow
@pytest.mark.parametrize(("kernel", "format"), [("tpu table", "mxfp4"), ("tpu experts", None), ("gpu experts", None)])
def test_rows_of_a_prompt(kernel, format):
    """More rows than are taken at once; each is what it is in a narrower window, where both are padded to one width."""
    leaf, w = experts_of(kernel, format)
    random = np.random.RandomState(8)
    chosen = np.stack([random.choice([0, 1, 3, 4], 2, replace=False) for _ in range(150)]).astype(np.int32)
    x = jnp.asarray(random.standard_normal((150, 2, K)), jnp.bfloat16)
    found = multiplied(kernel, x, chosen, leaf)
    for t in (0, 127, 128, 149):
        for c in range(2):
            assert_near(found[t, c][None], x[t, c][None], w[chosen[t, c]])
    np.testing.assert_array_equal(multiplied(kernel, x[:40], chosen[:40], leaf), found[:40])


@slow
@pytest.mark.parametrize(("kernel", "format"), [("tpu table", "mxfp4"), ("tpu experts", None)])
def test_experts_on_the_simulator(kernel, format, capfd):
    """With copies made as soon as they are asked for, memory full of NaN, and no two accesses that race."""
    leaf, w = experts_of(kernel, format)
    x = jnp.asarray(np.random.RandomState(9).standard_normal((len(CHOSEN), 1, K)), jnp.bfloat16)
    found = multiplied(kernel, x, CHOSEN, leaf, interpret=SIMULATOR)
    for (t, c), e in np.ndenumerate(CHOSEN):
        if e >= 0:
            assert_near(found[t, c][None], x[t, 0][None], w[e])
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("exponent", "mantissa"), [(2, 1), (2, 3), (3, 2), (4, 3), (5, 2)])
def test_small_floats_lack_a_power_of_two_where_their_bits_lie_in_an_f32(exponent, mantissa):
    """As the GPU decodes them; with subnormal numbers, which XLA takes for zero on CPU."""
    codes = jnp.arange(2 ** (1 + exponent + mantissa), dtype=jnp.int32)
    found = np.asarray(gpu_tables.placed(codes, exponent, mantissa)).view(np.float32).astype(np.float64)
    expected = element_values(codes, exponent, mantissa)
    np.testing.assert_array_equal(found * 2.0 ** (128 - 2 ** (exponent - 1)), expected)
    np.testing.assert_array_equal(small_floats(codes, exponent, mantissa), expected)


def test_scales_of_nvfp4_are_its_numbers():
    format, codes = FORMATS["nvfp4"], jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(numbers(codes, format), number_of_scale(codes, "e4m3"))
