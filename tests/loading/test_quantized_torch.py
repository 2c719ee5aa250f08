"""Weights that compressed-tensors itself packs, decoded by it and by us."""

import numpy as np
import pytest

from mlspecqd_jax.loading.quantized.method import METHODS
from mlspecqd_jax.loading.quantized.module import Module, Stored
from mlspecqd_jax.weights.cast import dequantize
from mlspecqd_jax.weights.quantized_array import QuantizedArray

pytestmark = pytest.mark.torch
N, K = 192, 320  # no whole tiles of 128, nor groups of it


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("compressed_tensors")
    return pytest.importorskip("torch")


CASES = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}),
    "uint4": ("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}),
    "int8 groups": ("pack-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}),
    "uint8": ("pack-quantized", {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}),
    "int8 rows": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}),
    "fp8 rows": ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}),
    "fp8 tiles": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [128, 128]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}),
}


def scales_of(torch, weight, weights, format):
    """Return what the packer is given beside a weight: scales by the largest magnitude, and zeros."""
    match weights["strategy"]:
        case "tensor":
            amax = weight.abs().amax().reshape(1)
        case "channel":
            amax = weight.abs().amax(1, keepdim=True)
        case "block":
            amax = torch.stack([torch.stack([t.abs().amax() for t in row.split(128, 1)]) for row in weight.split(128, 0)])
        case _:
            amax = weight.reshape(N, -1, weights["group_size"]).abs().amax(2)
    if format == "nvfp4-pack-quantized":
        divisor = (448 * 6 / weight.abs().amax()).reshape(1)
        return {"weight_scale": (amax / 6 * divisor).to(torch.float8_e4m3fn).float(), "weight_global_scale": divisor}
    if format == "mxfp4-pack-quantized":
        return {"weight_scale": torch.exp2(torch.floor(torch.log2(amax)) - 2)}
    largest = 448 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1) - 1
    if weights["symmetric"]:
        return {"weight_scale": amax / largest}
    grouped = weight.reshape(N, -1, weights["group_size"])
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scale = (high - low) / (2 ** weights["num_bits"] - 1)
    return {"weight_scale": scale, "weight_zero_point": (-(largest + 1) - low / scale).round().to(torch.int8)}


def stored(torch, kind, tensor):
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8"}
    dtype = names.get(tensor.dtype, "F32")
    return Stored(f"layer.{kind}", dtype, (tensor.view(torch.uint8) if dtype == "F8_E4M3" else tensor).numpy())


@pytest.mark.parametrize("case", CASES)
def test_a_weight_that_compressed_tensors_packed(torch, case):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    format, weights = CASES[case]
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    packer = BaseCompressor.get_value_from_registry(format)
    packed = packer.compress({"weight": weight} | scales_of(torch, weight, weights, format), scheme)
    theirs = packer.decompress(dict(packed), scheme)["weight"].float().numpy()
    module = Module("layer", (N, K), {kind: stored(torch, kind, tensor) for kind, tensor in packed.items() if tensor is not None})
    config = {"format": format, "config_groups": {"group_0": {"weights": weights}}}
    found = METHODS["compressed-tensors"](config)(module)
    ours = dequantize(QuantizedArray(found.arrays, (N, K), found.format), np.dtype(np.float32))
    # It decodes NVFP4 to bfloat16; float32 scales, and zeros times them, are rounded to float16 here.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=(2**-8 if case == "nvfp4" else 2**-10) * np.abs(theirs).max())
    assert np.abs(ours - weight.numpy()).mean() < 0.12 * np.abs(weight.numpy()).mean()
