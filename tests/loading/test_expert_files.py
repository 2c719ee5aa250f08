"""Files of experts' weights: what is missing, too much or of another shape is named, and what a converted checkpoint holds."""

import json

import family_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import config_file, huggingface
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.quantized_array import QuantizedArray

pytestmark = pytest.mark.usefixtures("compiled_quickly")
MIXTRAL = "model.layers.1.block_sparse_moe.experts"


def read(folder):
    return huggingface.read_params(folder, Network(config_file.read_config(folder)), jnp.dtype("float32"), None)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("mixtral", {f"{MIXTRAL}.3.w1.weight": None}, (f"missing tensor {MIXTRAL}.3.w1.weight",)),
        ("mixtral", {f"{MIXTRAL}.5.w1.weight": (56, 48)}, (f"unknown tensor {MIXTRAL}.5.w1.weight",)),
        ("mixtral", {f"{MIXTRAL}.2.w2.weight": (48, 55)}, (f"{MIXTRAL}.2.w2.weight has shape [48, 55]", "[48, 56]")),
        ("mixtral", {"model.layers.0.block_sparse_moe.gate.weight": (4, 48)}, ("gate.weight has shape [4, 48]", "[5, 48]")),
        (
            "gpt_oss",
            {"model.layers.0.mlp.experts.gate_up_proj": (4, 48, 112)},
            ("experts.gate_up_proj has shape [4, 48, 112]", "[5, 48, 112]"),
        ),
        (
            "gpt_oss",
            {"model.layers.0.mlp.experts.gate_up_proj_bias": (5, 111)},
            ("gate_up_proj_bias has shape [5, 111]", "[5, 112]"),
        ),
        ("granitemoe", {"model.layers.0.block_sparse_moe.output_linear.weight": None}, ("missing", "output_linear.weight")),
    ],
)
def test_files_that_do_not_fit(tmp_path, family, change, words):
    shapes = family_files.recorded(family)[0] | change
    with refused(*words, "download the weights and config.json again"):
        read(family_files.write(tmp_path, family, {name: shape for name, shape in shapes.items() if shape is not None}))


def test_experts_in_one_tensor_are_those_in_modules_of_their_own(tmp_path):
    """Files of one model_type hold the one or the other; what predicts further tokens is left out of both."""
    shapes, stacks = family_files.recorded("qwen3_5_moe_images")[0], {}
    tensors = {name: family_files.drawn(name, shape) for name, shape in shapes.items()}
    for at in sorted({name.partition(".experts.")[0] + ".experts" for name in shapes if ".experts." in name}):
        gate, up, down = (np.stack([tensors.pop(f"{at}.{e}.{x}_proj.weight") for e in range(5)]) for x in ("gate", "up", "down"))
        stacks |= {f"{at}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{at}.down_proj": down}
    config = family_files.CONFIGS["qwen3_5_moe_images"]
    more = {"mtp.layers.0.mlp.experts.gate_up_proj": np.ones((5, 4, 4), np.float32), "mtp.fc.weight": np.ones((4, 4), np.float32)}
    with pytest.warns(UserWarning, match="left out"):
        found = read(tiny.write_checkpoint(tmp_path / "stacked", config, tensors | stacks | more))
    with pytest.warns(UserWarning, match="left out"):
        plain = read(family_files.write(tmp_path / "plain", "qwen3_5_moe_images"))
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    stacks[f"{at}.down_proj"] = stacks[f"{at}.down_proj"][:4]
    with refused("experts.down_proj has shape [4, 48, 36]", "[5, 48, 36]"):
        read(tiny.write_checkpoint(tmp_path / "less", config, tensors | stacks))


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    shapes = family_files.recorded("glm4_moe")[0]
    behind = {"eh_proj.weight": (48, 96), "enorm.weight": (48,), "mlp.experts.0.up_proj.weight": (36, 48)}
    folder = family_files.write(tmp_path, "glm4_moe", shapes | {f"model.layers.2.{name}": shape for name, shape in behind.items()})
    with pytest.warns(UserWarning, match=r"left out what this model does not use: model\.layers\.2\."):
        params = read(folder)
    plain = read(family_files.write(tmp_path / "plain", "glm4_moe"))
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    without = {f"model.layers.2.{name}": shape for name, shape in behind.items() if name != "eh_proj.weight"}
    with refused("unknown tensor model.layers.2."):
        read(family_files.write(tmp_path / "odd", "glm4_moe", shapes | without))


@pytest.mark.slow
def test_a_converted_mixture_and_its_twin(tmp_path):
    """The twin's weights are what a cast makes of each expert's alone, and come back from the files as they were."""
    folder = family_files.write(tmp_path / "original", "glm4_moe")
    model = mlsd.load(mlsd.convert(folder, tmp_path / "converted", dtype="bfloat16", draft="mxfp4"))
    assert model.drafts  # although biases of a choice are in float32
    twin, again = model.quantized(), mlsd.load(folder).quantized()
    name = "model.layers.1.mlp.experts.down_proj.weight"
    assert isinstance(twin.params[name], QuantizedArray)
    assert twin.params[name].shape == (8 * 48, 36)
    gates = [name for name in twin.params if ".mlp.gate." in name]
    assert gates
    assert all(twin.params[name] is model.params[name] for name in gates)
    jax.tree.map(np.testing.assert_array_equal, twin.params, again.params)


def test_biases_of_the_choice_stay_in_float32(tmp_path):
    """As transformers keeps them: those of real models are larger than the scores, and bfloat16 would take them for equal."""
    model, name = mlsd.load(family_files.write(tmp_path, "minimax_m2")), "mlp.gate.e_score_correction_bias"
    assert {key: leaf.dtype.name for key, leaf in model.params.items() if leaf.dtype != "bfloat16"} == {
        f"model.layers.{i}.{name}": "float32" for i in range(2)
    }
    stored = family_files.drawn("model.layers.1.block_sparse_moe.e_score_correction_bias", (5,))
    np.testing.assert_array_equal(model.params[f"model.layers.1.{name}"], stored)
    assert model.network.init(0, jnp.bfloat16)[f"model.layers.1.{name}"].dtype == jnp.float32


@pytest.mark.slow
def test_a_mixture_is_measured_and_calibrated_like_any_model(tmp_path, monkeypatch):
    """Its twins are drafts, whatever made them: the text is plain decoding's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = mlsd.load(family_files.write(tmp_path / "model", "gpt_oss"), dtype="float32")
    costs = model.sensitivity()
    assert {name for name in model.params if ".experts." in name and name.endswith("weight")} <= set(costs)
    settings = {"max_new_tokens": 6, "stop_token_ids": []}
    plain = mlsd.generate(mlsd.stack(model), [[3, 1, 4]], **settings)
    for twin in (model.quantized(calibrate=True), model.quantized(bits=6.0)):
        assert mlsd.generate(mlsd.stack(model, (twin, 3)), [[3, 1, 4]], **settings).tokens == plain.tokens


def test_formats_whose_scales_experts_would_share_are_refused(tmp_path):
    model = mlsd.load(family_files.write(tmp_path, "mixtral"), dtype="float32")
    with refused("mlp.experts.", "rows for each expert, but 128 share a scale", "another format"):
        model.quantized("fp8_e4m3_128x128")


def test_older_spellings_of_the_number_of_experts(tmp_path):
    config = family_files.CONFIGS["qwen3_moe"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = config_file.read_config(tmp_path)
    other = {key: value for key, value in config.items() if key != "num_experts"} | {"num_local_experts": 5}
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert config_file.read_config(tmp_path) == ours


def test_llama_4_within_a_model_that_sees_images(tmp_path):
    """Its files have the language model's names behind a prefix; what transformers makes of one needs images."""
    config, shapes = family_files.CONFIGS["llama4"], family_files.recorded("llama4")[0]
    plain = read(family_files.write(tmp_path / "text", "llama4"))
    tensors = {f"language_model.{name}": family_files.drawn(name, shape) for name, shape in shapes.items()}
    tensors["vision_model.class_embedding"] = np.ones(8, np.float32)
    folder = tiny.write_checkpoint(
        tmp_path / "images", {"model_type": "llama4", "text_config": config, "vision_config": {}}, tensors
    )
    with pytest.warns(UserWarning, match="vision_model"):
        jax.tree.map(np.testing.assert_array_equal, read(folder), plain)
