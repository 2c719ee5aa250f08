"""Faults of quantized folders, planted one by one: each is refused in one sentence that names the tensor."""

import json

import numpy as np
import pytest
import quantized_folders as made
import quantized_layouts as layouts
from refusals import refused

from mlspecqd_jax.loading import config_file
from mlspecqd_jax.loading.quantized.folder import open_folder
from mlspecqd_jax.loading.quantized.method import find_quantization, reader_of
from mlspecqd_jax.network.network import Network

PLAIN = made.weights()
Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def leaves(folder):
    network = Network(config_file.read_config(folder))
    return dict(open_folder(folder, network).leaves(reader_of(find_quantization(folder))))


def write(folder, layout, change=None, config=made.CONFIG, **quantization):
    tensors, _ = made.quantized(layout, PLAIN)
    if change is not None:
        change(tensors)
    return made.write(folder / "quantized", tensors, made.LAYOUTS[layout][0] | quantization, config)


def put(name, value):
    """A change of one tensor, by a function of it or to an array; None takes it away."""

    def change(tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name].copy()) if callable(value) else value

    return change


def at(index, value):
    def change(array):
        array[index] = value
        return array

    return change


BITS = layouts.as_e4m3

FAULTS = [
    # What is there.
    ("gptq", f"{Q}.qzeros", None, ("is missing",)),
    ("gptq", f"{Q}.scales", None, ("is missing",)),
    ("nvfp4", f"{Q}.weight_global_scale", None, ("is missing",)),
    ("modelopt nvfp4", f"{Q}.weight_scale_2", None, ("is missing",)),
    ("fp8 tiles", f"{Q}.weight_scale_inv", None, ("is missing",)),
    ("int8", f"{Q}.weight_scale", None, ("is missing",)),
    ("quark fp4", f"{Q}.weight_scale", None, ("is missing",)),
    ("int4", f"{Q}.weight_shape", None, ("is missing",)),
    ("gptq", f"{Q}.weight", np.zeros((64, 64), np.float16), ("is not accounted for beside qweight",)),
    ("awq", f"{Q}.g_idx", np.zeros(64, np.int32), ("is not accounted for",)),
    ("awq", f"{Q}.pre_quant_scale", np.ones(64, np.float16), ("smoothed activations",)),
    ("modelopt nvfp4", f"{Q}.svdquant_lora_a", np.ones(64, np.float16), ("a low-rank part",)),
    ("gptq", f"{Q}.bias", np.ones(64, np.float16), ("unknown tensor",)),
    ("gptq", "model.layers.2.mlp.up_proj.qweight", np.zeros((8, 8), np.int32), ("unknown tensor",)),
    ("gptq", "model.embed_tokens.qweight", np.zeros((8, 8), np.int32), ("unknown tensor",)),
    ("gptq", "model.norm.weight", None, ("missing tensor",)),
    ("gptq", "model.norm.weight", np.zeros(63, np.float16), ("has shape [63]", "[64]")),
    ("gptq", "model.norm.weight", np.zeros(64, np.int8), ("is stored as I8", "F32")),
    ("gptq", f"{Q}.qweight", np.zeros((8, 64), np.int64), ("is stored as I64", "I32")),
    ("fp8 rows", f"{Q}.weight", np.zeros((64, 64), np.uint8), ("is stored as U8", "F8_E4M3")),
    ("fp8 rows", f"{Q}.weight", BITS(np.zeros((64, 64))).view("float8_e5m2"), ("is stored as F8_E5M2",)),
    # Shapes, by the config's groups.
    ("gptq", f"{Q}.qweight", lambda w: w[:-1], ("has shape [7, 64]", "[8, 64] or [16, 64]")),
    ("gptq", f"{DOWN}.scales", lambda s: s[:1], ("has shape [1, 64]", "[2, 64]")),
    ("gptq", f"{DOWN}.qzeros", lambda z: z[:1], ("has shape [1, 8]", "[2, 8]")),
    ("gptq", f"{DOWN}.g_idx", lambda g: g[:-1], ("has shape [191]", "[192]")),
    ("awq", f"{Q}.qweight", lambda w: np.ascontiguousarray(w.T), ("has shape [8, 64]", "[64, 8]")),
    ("int4", f"{Q}.weight_packed", lambda w: w[:, :-1], ("has shape [64, 7]",)),
    ("int4", f"{Q}.weight_shape", np.array([64, 63]), ("is not [64, 64]",)),
    ("uint4", f"{Q}.weight_zero_point", lambda z: np.ascontiguousarray(z.T), ("has shape [1, 8]", "[8, 1]")),
    ("fp8 tiles", f"{DOWN}.weight_scale_inv", lambda s: s[:, :1], ("has shape [1, 1]", "[1, 2]")),
    ("nvfp4", f"{Q}.weight_scale", lambda s: s.reshape(-1), ("has shape [256]", "[64, 4]")),
    ("mxfp4", f"{Q}.weight_scale", lambda s: np.pad(s, ((0, 64), (0, 2))), ("has shape [128, 4]", "[64, 2]")),
    # Values.
    ("gptq", f"{Q}.scales", at((0, 3), np.nan), ("NaN or infinity",)),
    ("gptq", f"{DOWN}.scales", at(1, 0), ("a row of zeros only",)),
    ("int8", f"{Q}.weight_scale", at(5, 0), ("a row of zeros only",)),
    ("fp8 tiles", f"{Q}.weight_scale_inv", at((0, 0), np.inf), ("NaN or infinity",)),
    ("fp8 rows", f"{Q}.weight", at((2, 2), BITS(np.array(127))), ("holds NaN",)),
    ("mxfp4", f"{Q}.weight_scale", at((2, 1), 255), ("holds NaN (byte 255)",)),
    ("nvfp4", f"{Q}.weight_scale", at((2, 1), BITS(np.array(255))), ("holds NaN",)),
    ("nvfp4", f"{Q}.weight_scale", at(2, BITS(np.zeros(4))), ("a row of zeros",)),
    ("nvfp4", f"{Q}.weight_scale", at((2, 1), BITS(np.array(200))), ("a negative scale",)),
    ("nvfp4", f"{Q}.weight_global_scale", np.zeros(1, np.float32), ("is 0.0, but must be positive",)),
    ("nvfp4", f"{Q}.weight_global_scale", np.full(1, np.inf, np.float32), ("is inf, but must be positive",)),
    ("modelopt nvfp4", f"{Q}.weight_scale_2", np.array(-1, np.float32), ("is -1.0, but must be positive",)),
    ("gptq", f"{DOWN}.qzeros", at((1, 0), 0x77777767), ("zeros other than 7 or 8", "the config says sym")),
    ("gptq act-order", f"{DOWN}.g_idx", at(0, 2), ("does not deal 192 inputs into groups of 128",)),
    ("gptq act-order", f"{DOWN}.g_idx", at(slice(0, 3), 1), ("does not deal",)),
    ("gptq act-order", f"{DOWN}.g_idx", at(0, -1), ("does not deal",)),
]


@pytest.mark.parametrize(("layout", "name", "value", "words"), FAULTS, ids=[f"{f[0]}-{f[1]}-{f[3][0]}" for f in FAULTS])
def test_a_planted_fault(tmp_path, layout, name, value, words):
    with refused(name, *words):
        leaves(write(tmp_path, layout, put(name, value)))


AGREE = [
    ("gptq", {"bits": 8}, f"{DOWN}.scales", ("needs",)),
    ("gptq", {"group_size": 64}, f"{DOWN}.scales", ("has shape [2, 64]", "[3, 64]")),
    ("awq", {"zero_point": False}, f"{DOWN}.qzeros", ("zeros other than 8",)),
    ("int8", made.compressed("float-quantized", type="float", num_bits=8, strategy="channel"), "weight", ("are int-quantized",)),
    (
        "int4",
        made.compressed("pack-quantized", num_bits=4, group_size=32, symmetric=False),
        "weight_scale",
        ("zero point is missing",),
    ),
    ("uint4", made.compressed("pack-quantized", num_bits=4, group_size=64), "weight_zero_point", ("zero point is there",)),
    ("modelopt nvfp4", {"quant_algo": "FP8"}, "weight", ("are NVFP4, but the config says FP8",)),
    ("quark fp4", made.quark("fp8_e4m3", qscheme="per_tensor"), "weight", ("may be fp4, but the config says fp8_e4m3",)),
]


@pytest.mark.parametrize(("layout", "quantization", "name", "words"), AGREE)
def test_a_config_that_says_otherwise(tmp_path, layout, quantization, name, words):
    with refused(name, *words):
        leaves(write(tmp_path, layout, **quantization))


def test_groups_that_could_be_two_are_refused(tmp_path):
    other = {"+:x": {"group_size": 96}}  # 192 inputs in two groups of 128, or of 96
    with refused(f"{DOWN}.scales", "4 bits in 2 groups over 192 inputs", "several such"):
        leaves(write(tmp_path, "gptq", dynamic=other))


VARIANTS = [
    ("gptq", {"quant_method": "bitsandbytes"}, ("'bitsandbytes' are not read", "compressed-tensors, gptq, awq")),
    ("gptq", {"quant_method": 7}, ("quantized already", "no quant_method")),
    ("gptq", {"bits": 3}, ("bits is 3", "4 and 8")),
    ("gptq", {"group_size": 24}, ("group_size is 24", "16")),
    ("gptq", {"checkpoint_format": "marlin"}, ("checkpoint_format is 'marlin'", "gptq, gptq_v2")),
    ("gptq", {"is_marlin_format": True}, ("is_marlin_format",)),
    ("gptq", {"pack_dtype": "int16"}, ("pack_dtype", "int32")),
    ("awq", {"version": "gemv"}, ("version is 'gemv'", "gemm")),
    ("awq", {"bits": 3}, ("bits is 3",)),
    ("auto-round", {"packing_format": "auto_round:marlin"}, ("packing_format",)),
    ("int4", {"format": "marlin-24"}, ("format is 'marlin-24'",)),
    ("int4", {"quantization_status": "frozen"}, ("quantization_status is 'frozen'",)),
    ("int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ("sparse-24-bitmask", "dense")),
    ("int4", {"transform_config": {"config_groups": {"u": {}}}}, ("transform_config",)),
    ("int4", {"config_groups": {}}, ("config_groups",)),
    ("int4", {"config_groups": []}, ("config_groups",)),
    ("int4", made.compressed("pack-quantized", num_bits=3, group_size=32), ("num_bits is 3",)),
    ("fp8 rows", made.compressed("float-quantized", type="float", num_bits=8, strategy="block"), ("block_structure is None",)),
    ("fp8 tiles", {"weight_block_size": [64, 64]}, ("weight_block_size is [64, 64]",)),
    ("fp8 tiles", {"fmt": "e5m2"}, ("fmt is 'e5m2'",)),
    ("modelopt nvfp4", {"quant_algo": "NVFP4_AWQ"}, ("quant_algo is 'NVFP4_AWQ'",)),
    ("quark fp4", {"export": {"weight_format": "fake_quantized"}}, ("weight_format",)),
    ("quark fp4", {"global_quant_config": {"weight": [{"dtype": "int4"}, {"dtype": "fp8_e4m3"}]}}, ("one stage alone",)),
    ("quark fp4", made.quark("mx"), ("dtype is 'mx'",)),
]


@pytest.mark.parametrize(("layout", "quantization", "words"), VARIANTS, ids=[" ".join(v[2])[:40] for v in VARIANTS])
def test_a_method_or_variant_that_is_not_read(tmp_path, layout, quantization, words):
    with refused("config.json", *words):
        leaves(write(tmp_path, layout, **quantization))


def test_configs_beside_a_config_that_says_nothing(tmp_path):
    for layout, file, text in (
        ("modelopt nvfp4", "hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}),
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 128, "sym": True}),
    ):
        tensors, _ = made.quantized(layout, PLAIN)
        folder = made.write(tmp_path / layout, tensors, None)
        assert find_quantization(folder) is None
        (folder / file).write_text(json.dumps(text))
        assert len(leaves(folder)) == len(PLAIN)
        assert find_quantization(folder).file == folder / file


def test_a_folder_that_says_so_without_a_quantized_weight(tmp_path):
    folder = made.write(tmp_path / "plain", {name: w.astype(np.float16) for name, w in PLAIN.items()}, made.GPTQ)
    with refused("no weight is quantized, although a file says so"):
        leaves(folder)


def test_what_does_not_bear_on_weights_is_left_out(tmp_path):
    def change(tensors):
        tensors[f"{Q}.input_scale"] = tensors["model.layers.0.self_attn.k_proj.k_scale"] = np.ones((), np.float32)
        tensors[f"{Q}.input_global_scale"] = tensors["model.layers.0.self_attn.k_scale"] = np.ones(1, np.float32)
        tensors[f"{Q}.bias"] = np.zeros(64, np.float16)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    folder = write(tmp_path, "gptq", change)
    with pytest.warns(UserWarning, match=r"left out what this model does not use: .*k_scale, .*inv_freq"):
        assert leaves(folder).keys() == PLAIN.keys()


def test_a_tied_head_that_was_quantized_all_the_same_is_left_out(tmp_path):
    def change(tensors):
        head, _ = made.LAYOUTS["gptq"][1](PLAIN["lm_head.weight"][:96].astype(np.float64))
        del tensors["lm_head.weight"]
        tensors |= {f"lm_head.{kind}": array for kind, array in head.items()}

    folder = write(tmp_path, "gptq", change, made.CONFIG | {"tie_word_embeddings": True})
    with pytest.warns(UserWarning, match="left out"):
        assert leaves(folder).keys() == PLAIN.keys() - {"lm_head.weight"}


def test_a_family_whose_files_have_other_names(tmp_path):
    folder = write(tmp_path, "gptq", config=made.CONFIG | {"model_type": "phi3", "rope_scaling": None})
    with refused("gate_up_proj", "give the original checkpoint"):
        leaves(folder)
