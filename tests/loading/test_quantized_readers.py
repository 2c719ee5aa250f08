"""Every layout of others' weights as it is read: the values that the formulas give, from random codes and from rounded weights."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_layouts as layouts
from quantized_layouts import Grouped, decode

from mlspecqd_jax.loading.quantized import floats, grouped
from mlspecqd_jax.loading.quantized.codes import joined
from mlspecqd_jax.loading.quantized.method import METHODS
from mlspecqd_jax.loading.quantized.module import Module, Stored
from mlspecqd_jax.weights.cast import dequantize
from mlspecqd_jax.weights.products import multiply
from mlspecqd_jax.weights.quantized_array import QuantizedArray

N, K = 48, 192


def module(tensors, shape):
    def stored(kind, array):
        dtype = layouts.NAMES[array.dtype.name]
        return Stored(f"layer.{kind}", dtype, array.view(np.uint8) if dtype.startswith("F8") else array)

    return Module("layer", shape, {kind: stored(kind, np.asarray(array)) for kind, array in tensors.items()})


def read(method, config, tensors, shape):
    """Return (what a layer is stored as, its values)."""
    packed = METHODS[method](config)(module(tensors, shape))
    values = decode(packed.format, packed.arrays, shape)
    ours = dequantize(QuantizedArray(packed.arrays, shape, packed.format), np.dtype(np.float32))
    np.testing.assert_allclose(ours, values, rtol=1e-6, atol=1e-6 * np.abs(values).max())
    return packed, values


def codes(bits=4, group=64, k=K, symmetric=False, of=None, dtype=np.float16, n=N, seed=0):
    """Return random codes, zeros and scales; every zero there is occurs."""
    random = np.random.default_rng(seed)
    groups = -(-k // group)
    q = random.integers(0, 2**bits, (n, k))
    z = np.full((n, groups), 2 ** (bits - 1)) if symmetric else random.integers(0, 2**bits, (n, groups))
    s = (random.random((n, groups)) * 0.02 + 1e-3).astype(dtype)
    return Grouped(q, z, s, bits, group, np.arange(k) // group if of is None else of)


def close(found, a: Grouped):
    """Zeros times scales are rounded to float16; all else is exact."""
    np.testing.assert_allclose(found, a.weight, rtol=0, atol=2.0**-11 * np.max(a.z * a.s.astype(float)))


def shuffled(k, group):
    return np.random.default_rng(9).permutation(np.arange(k) // group)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": True}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(bits, version, act_order):
    a = codes(bits, of=shuffled(K, 64) if act_order else None)
    assert (a.z == 0).any()  # which borrows from its neighbour in version 1
    config = GPTQ | {"bits": bits, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    packed, values = read("gptq", config, layouts.gptq(a, version), (N, K))
    assert packed.format == f"uint{bits}_g64"
    assert ("order" in packed.arrays) == act_order
    close(values, a)


@pytest.mark.parametrize("said", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_gptq_is_of_the_version_that_its_zeros_say(bits, version, said):
    a = codes(bits, symmetric=True)
    config = GPTQ | {"bits": bits, "sym": True, "checkpoint_format": said}
    packed, values = read("gptq", config, layouts.gptq(a, version), (N, K))
    assert packed.format == f"int{bits}_g64"
    np.testing.assert_array_equal(values, a.weight)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_group_that_is_cut_off_is_as_wide_as_the_config_says(act_order):
    of = np.random.default_rng(2).permutation(np.arange(K) // 128) if act_order else None
    a = codes(group=128, symmetric=True, of=of)
    config = GPTQ | {"group_size": 128, "sym": True}
    packed, values = read("gptq", config, layouts.gptq(a), (N, K))
    assert packed.format == "int4_g128"
    assert packed.arrays["scales"].shape == (N, 2)
    np.testing.assert_array_equal(values, a.weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_of_whole_rows_rounds_nothing(bits, symmetric):
    a = codes(bits, group=K, symmetric=symmetric)
    packed, values = read("gptq", GPTQ | {"bits": bits, "group_size": -1}, layouts.gptq(a), (N, K))
    assert packed.format == ({4: "int4_g192", 8: "int8"} if symmetric else {4: "uint4_g192", 8: "uint8_g192"})[bits]
    np.testing.assert_allclose(values, a.weight, rtol=1e-12)


def test_layers_of_other_settings_are_told_by_their_tensors():
    a = codes(8, group=32, symmetric=True)
    config = GPTQ | {"sym": True, "dynamic": {"-:.*lm_head": {}, "+:.*down": {"bits": 8, "group_size": 32}}}
    packed, values = read("gptq", config, layouts.gptq(a), (N, K))
    assert packed.format == "int8_g32"
    np.testing.assert_array_equal(values, a.weight)


AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 64}


@pytest.mark.parametrize("packing", ["auto_gptq", "gptqmodel", "auto_awq"])
def test_auto_round(packing):
    a = codes()
    tensors = layouts.awq(a) if packing == "auto_awq" else layouts.gptq(a, 1 if packing == "auto_gptq" else 2)
    _, values = read("auto-round", AUTO_ROUND | {"sym": False, "packing_format": f"auto_round:{packing}"}, tensors, (N, K))
    close(values, a)


@pytest.mark.parametrize("keys", [("bits", "group_size"), ("w_bit", "q_group_size")])
def test_awq(keys):
    a = codes(group=32)
    config = {"quant_method": "awq", keys[0]: 4, keys[1]: 32, "zero_point": True, "version": "gemm"}
    packed, values = read("awq", config, layouts.awq(a), (N, K))
    assert packed.format == "uint4_g32"
    close(values, a)


def test_symmetric_awq():
    a = codes(group=32, symmetric=True)
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False, "version": "gemm"}
    packed, values = read("awq", config, layouts.awq(a), (N, K))
    assert packed.format == "int4"
    np.testing.assert_array_equal(values, a.weight)


def compressed(format, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "strategy": "group"} | weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.parametrize("k", [192, 51])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pack_quantized(bits, symmetric, dtype, k):
    a = codes(bits, 32, k, symmetric, dtype=dtype, n=45)  # the zeros' words along N are not full
    config = compressed("pack-quantized", num_bits=bits, group_size=32, symmetric=symmetric)
    packed, values = read("compressed-tensors", config, layouts.pack_quantized(a, not symmetric), (45, k))
    assert packed.format == ("int4" if bits == 4 else "int8_g32") if symmetric else f"uint{bits}_g32"
    if symmetric and dtype != np.float32:  # whose scales float16 rounds
        np.testing.assert_array_equal(values, a.weight)
    else:
        np.testing.assert_allclose(values, a.weight, rtol=0, atol=2.0**-10 * np.max(2**bits * a.s.astype(float)))


def test_bfloat16_scales_below_the_range_of_float16():
    a = codes(group=32, symmetric=True)
    a = a._replace(s=(a.s.astype(float) * 2.0**-20).astype(ml_dtypes.bfloat16))
    packed, values = read(
        "compressed-tensors", compressed("pack-quantized", num_bits=4, group_size=32), layouts.pack_quantized(a), (N, K)
    )
    assert np.log2(packed.arrays["tensor_scale"]) % 1 == 0
    np.testing.assert_array_equal(values, a.weight)


def test_pack_quantized_in_the_order_of_activations():
    a = codes(group=64, symmetric=True, of=shuffled(K, 64))
    tensors = layouts.pack_quantized(a) | {"weight_g_idx": a.of.astype(np.int32)}
    _, values = read("compressed-tensors", compressed("pack-quantized", num_bits=4, group_size=64), tensors, (N, K))
    np.testing.assert_array_equal(values, a.weight)


@pytest.mark.parametrize("symmetric", [False, True])
def test_int_quantized(symmetric):
    a = codes(8, K, K, symmetric, dtype=np.float32)
    config = compressed("int-quantized", num_bits=8, strategy="channel", symmetric=symmetric)
    packed, values = read("compressed-tensors", config, layouts.int_quantized(a, not symmetric), (N, K))
    assert packed.format == ("int8" if symmetric else "uint8_g192")
    np.testing.assert_allclose(values, a.weight, rtol=1e-6)


W = np.random.default_rng(5).standard_normal((160, 192)).astype(np.float32) * 0.05  # no whole tiles of 128
FP8 = {"type": "float", "num_bits": 8}


@pytest.mark.parametrize("kind", ["tensor", "row", "tile"])
def test_fp8(kind):
    a = layouts.e4m3(W, kind)
    strategy = {"tensor": "tensor", "row": "channel", "tile": "block"}[kind]
    of_ct = compressed("float-quantized", **FP8, strategy=strategy, block_structure=[128, 128] if kind == "tile" else None)
    scale = a.scales.reshape(1) if kind == "tensor" else a.scales
    of_fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128] if kind == "tile" else None}
    for method, config, tensors in (
        ("compressed-tensors", of_ct, {"weight": a.codes, "weight_scale": scale}),
        ("fp8", of_fp8, {"weight": a.codes, "weight_scale_inv": a.scales}),
        ("fp8", of_fp8, {"weight": a.codes, "weight_scale": a.scales}),
    ):
        packed, values = read(method, config, tensors, W.shape)
        assert packed.format == ("fp8_e4m3_128x128" if kind == "tile" else "fp8_e4m3")
        np.testing.assert_array_equal(values, a.weight)
    if kind == "row":
        for method, config in (
            ("modelopt", {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
            ("quark", quark("fp8_e4m3", qscheme="per_channel")),
        ):
            _, values = read(method, config, {"weight": a.codes, "weight_scale": a.scales[:, 0]}, W.shape)
            np.testing.assert_array_equal(values, a.weight)
    if kind == "tensor":
        _, values = read("modelopt", {"quant_algo": "FP8"}, {"weight": a.codes, "weight_scale": a.scales}, W.shape)
        np.testing.assert_array_equal(values, a.weight)


def quark(dtype, **weight):
    return {"global_quant_config": {"weight": {"dtype": dtype} | weight}, "export": {"pack_method": "reorder"}}


def test_nvfp4_divides_by_one_global_scale_and_multiplies_by_the_other():
    factor = np.float32(np.abs(W).max() / 448 / 6)
    a = layouts.nv(W, float(factor))
    one, other = np.full(1, 1 / factor, np.float32), np.array(factor)
    for method, config, tensors in (
        (
            "compressed-tensors",
            compressed("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group"),
            {"weight_packed": layouts.nibbles(a.codes), "weight_scale": a.scales, "weight_global_scale": one},
        ),
        (
            "modelopt",
            {"quant_algo": "NVFP4"},
            {"weight": layouts.nibbles(a.codes), "weight_scale": a.scales, "weight_scale_2": other},
        ),
    ):
        packed, values = read(method, config, tensors, W.shape)
        assert packed.format == "nvfp4"
        np.testing.assert_allclose(values, a.weight, rtol=1e-6)


def test_mxfp4():
    a = layouts.mx(W)
    of_ct = compressed("mxfp4-pack-quantized", type="float", num_bits=4, strategy="group", group_size=32)
    pairs = layouts.nibbles(a.codes)
    plain = {"weight": pairs, "weight_scale": a.scales}
    for method, config, tensors in (
        ("compressed-tensors", of_ct, {"weight_packed": pairs, "weight_scale": a.scales}),
        ("modelopt", {"quant_algo": "mxfp4"}, plain),
        ("quark", quark("fp4", scale_format="e8m0", group_size=32), plain),
    ):
        packed, values = read(method, config, tensors, W.shape)
        assert packed.format == "mxfp4"
        np.testing.assert_array_equal(values, a.weight)


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_quark_integers(dtype):
    a = codes(group=32)
    config = quark(dtype, qscheme="per_group", group_size=32)
    _, values = read("quark", config, layouts.quark_int4(a, dtype == "int4"), (N, K))
    close(values, a)


@pytest.mark.parametrize(("group", "bits"), [(16, 4), (16, 8), (48, 4), (None, 4), (None, 8)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_are_no_multiple_of_32_are_filled_up_with_their_groups(group, bits, symmetric):
    """So that the weight is dequantized and multiplied as any other."""
    a = codes(bits=bits, group=group or 48, k=48, symmetric=symmetric, n=6)
    q, z, s = a.q, a.z, a.s
    scales, width = s.astype(np.float32), group or 48
    stored = grouped.packed(joined(q.astype(np.uint8), bits), scales, z.astype(np.uint8), bits, group, 48)
    leaf = QuantizedArray({role: jnp.asarray(array) for role, array in stored.arrays.items()}, (6, 48), stored.format)
    exact = (q - z.repeat(width, 1)) * scales.repeat(width, 1)
    np.testing.assert_allclose(dequantize(leaf, jnp.float32), exact, atol=2e-3 * np.abs(exact).max())
    x = np.random.default_rng(1).standard_normal((3, 48)).astype(np.float32)
    np.testing.assert_allclose(multiply(jnp.asarray(x), leaf), x @ exact.T, atol=5e-3 * np.abs(exact).max() * 48)


def test_nvfp4_of_48_inputs():
    tensors = {"codes": np.full((6, 24), 0x42, np.uint8), "scales": np.ones((6, 3), ml_dtypes.float8_e4m3fn)}
    found = floats.nvfp4(module(tensors, (6, 48)), "codes", "scales", np.float32(2))
    leaf = QuantizedArray({role: jnp.asarray(array) for role, array in found.arrays.items()}, (6, 48), found.format)
    np.testing.assert_array_equal(dequantize(leaf, jnp.float32), np.tile([2.0, 4.0], (6, 24)))
