"""`describe`: the numbers of what would be loaded, from config.json alone, and the sentence that loading would refuse by."""

import dataclasses
import functools
import json
import pathlib

import family_files
import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading.description import describe
from mlspecqd_jax.network.config import Experts, Router
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.formats import FORMATS
from mlspecqd_jax.weights.quantization import default_policy, quantize_params
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD


def config_json(folder: pathlib.Path, config: dict) -> pathlib.Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
def test_a_format_s_bytes_are_those_of_what_is_stored(format):
    for n, k in ((1, 1), (7, 33), (130, 300), (256, 128)):
        stored = jax.eval_shape(functools.partial(quantize, format=format.name), jax.ShapeDtypeStruct((n, k), jnp.bfloat16))
        assert format.nbytes(n, k) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored)), (n, k)


@pytest.mark.parametrize(
    "name", ["qwen3", "gpt2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt2_scaled", "cohere_norms", "apertus"))]
)
def test_the_numbers_are_those_of_the_loaded_model(tmp_path, name):
    write = tiny.write_family if name in tiny.FAMILIES else family_files.write
    model = mlsd.load(write(tmp_path / name, name))
    found = describe(config_json(tmp_path, json.loads((tmp_path / name / "config.json").read_text())))
    assert found["parameters"] == model.num_parameters
    assert found.get("parameters_per_token", found["parameters"]) == model.bytes_read() / 2
    assert (found["bytes_in_bfloat16"], found["pass_bytes"]) == (model.nbytes, model.bytes_read())
    cache = model.network.init_cache(model.params, 2, 8)
    assert found["cache_bytes_per_token"] * 2 * 8 == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert (found["positions"], found["vocabulary"]) == (model.card.max_positions, model.card.vocab_size)
    for format in ("mxfp4", "nvfp4"):
        policy = default_policy(format, model.network.config.tied, "cpu")
        twin = quantize_params(model.params, model.network.tensors(), format, policy)
        own = sum(leaf.nbytes for name, leaf in twin.items() if leaf is not model.params.get(name))
        tables = {name for name, tensor in model.network.tensors().items() if tensor.gathered}
        read = sum(leaf.nbytes for name, leaf in twin.items() if name not in tables)
        assert HEAD in twin
        assert found["twins"][format] == {"bytes": own, "part_of_pass": read / model.bytes_read()}


def test_what_a_row_keeps_however_long_its_text_is(tmp_path):
    """Of Qwen3.6-35B-A3B: 30 states of 32 x 128 x 128 in float32, and what 3 positions before a window are convolved of."""
    sizes = {
        "num_hidden_layers": 40,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
    }
    found = describe(config_json(tmp_path, {"model_type": "qwen3_5_moe", "vision_config": {}, "text_config": sizes}))
    assert (found["parameters"], found["parameters_per_token"]) == (34_660_610_688, 2_946_429_568)
    assert found["cache_bytes_per_token"] == 10 * 2 * 2 * 256 * 2
    assert found["state_bytes"] == 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2 + 4)
    assert found["replay_bytes_per_token"] == 30 * ((8192 + 2048 + 4096) * 2 + 2 * 32 * 4)
    assert found["layers"] == "40 x hidden 2048, 10 of them of attention, 16 heads, 2 key/value heads"


KNOWN = {  # parameters, and what of them a pass over a token reads, as the models' own pages and files have them
    "HuggingFaceTB--SmolLM2-135M": (134_515_008, None, 23_040),
    "Qwen--Qwen2-0.5B": (494_032_768, None, 12_288),
    "Qwen--Qwen3-8B": (8_190_735_360, 7_568_405_504, 147_456),
    "meta-llama--Llama-2-7b-hf": (6_738_415_616, 6_607_343_616, 524_288),
    "meta-llama--Llama-3.2-1B-Instruct": (1_235_814_400, None, 32_768),
    "meta-llama--Meta-Llama-3.1-8B": (8_030_261_248, 7_504_924_672, 131_072),
    "mistralai--Mistral-7B-Instruct-v0.3": (7_248_023_552, 7_113_805_824, 131_072),
}


def test_configs_of_the_hub_are_described_or_refused_in_one_sentence(shared):
    paths = sorted((shared / "configs").glob("*/config.json"))
    assert len(paths) >= 15
    described, refusals = {}, []
    for path in paths:
        try:
            described[path.parent.name] = describe(path)
        except mlsd.InputError as error:
            refusals.append(str(error))
    assert all("is not supported" in sentence and "\n" not in sentence for sentence in refusals)
    assert described.keys() >= KNOWN.keys()
    for name, (parameters, per_token, cache) in KNOWN.items():
        found = described[name]
        assert (found["parameters"], found.get("parameters_per_token"), found["cache_bytes_per_token"]) == (
            parameters,
            per_token,
            cache,
        )
        assert 0.25 < found["twins"]["mxfp4"]["part_of_pass"] < 0.34


def model_types() -> list[str]:
    """Return the model types that transformers generates text with; the module that lists them is read, since it wants PyTorch."""
    import ast

    import transformers

    source = pathlib.Path(transformers.__file__).parent / "models" / "auto" / "modeling_auto.py"
    wanted = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
    found = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in wanted:
            found |= {name for name, _ in ast.literal_eval(node.value.args[0])}
    return sorted(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_model_type_of_transformers_is_described_or_refused_in_one_sentence(tmp_path):
    from transformers import CONFIG_MAPPING

    described, refusals, without = set(), {}, set()
    for name in model_types():
        try:
            CONFIG_MAPPING[name]().save_pretrained(tmp_path)
        except Exception:  # one whose own class refuses its defaults
            without.add(name)
            continue
        try:
            assert describe(tmp_path)["parameters"] > 10**6
            described.add(name)
        except mlsd.InputError as error:
            refusals[name] = str(error)
    assert len(without) < 5, without
    assert len(described) >= 50
    assert len(described) + len(refusals) > 250
    odd = [name for name, sentence in refusals.items() if "is not supported" not in sentence]
    # The one's default is no number of experts, the other's heads have 21 elements to rotate in pairs.
    assert odd == ["deepseek_v2", "glm4_moe"]
    for sentence in refusals.values():
        assert "\n" not in sentence
        assert len(sentence) < 1200


REFUSED = {
    "a mixture of experts": {"model_type": "qwen3_moe", "num_experts": 8},
    "no layers": folders.CONFIG | {"num_hidden_layers": 0},
    "a missing key": {key: value for key, value in folders.CONFIG.items() if key != "hidden_size"},
    "another activation": folders.CONFIG | {"hidden_act": "tanh"},
    "no object": [],
}


@pytest.mark.parametrize("config", REFUSED.values(), ids=list(REFUSED))
def test_a_refusal_is_the_sentence_of_loading(tmp_path, config):
    path = config_json(tmp_path, config)
    with pytest.raises(mlsd.InputError) as loading:
        mlsd.load(tmp_path)
    for place in (tmp_path, path):
        with pytest.raises(mlsd.InputError) as describing:
            describe(place)
        assert str(describing.value) == str(loading.value)


def test_no_weight_is_read_and_no_array_is_made(tmp_path):
    config_json(tmp_path, folders.CONFIG)
    (tmp_path / "model.safetensors").mkdir()
    before = len(jax.live_arrays())
    found = describe(tmp_path)
    assert len(jax.live_arrays()) == before
    assert found["tokenizer"] == "none"
    assert found["weights"] == "plain"
    alone = describe(tmp_path / "config.json")
    assert {key: found[key] for key in alone if key not in ("model", "source")} == {
        key: value for key, value in alone.items() if key not in ("model", "source")
    }


def test_quantized_weights_are_named_or_refused(tmp_path):
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    path = config_json(tmp_path, folders.CONFIG | {"quantization_config": gptq})
    assert describe(path)["weights"] == describe(tmp_path)["weights"] == "quantized by gptq"
    config_json(tmp_path, folders.CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}})
    for place in (path, tmp_path):
        with refused("'bitsandbytes' are not read", "gptq"):
            describe(place)


def test_of_a_hub_id_config_json_alone_is_asked_for(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo_id, allow_patterns=None, local_files_only=False):
        asked.append((repo_id, allow_patterns, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with refused("config.json is missing"):
        describe("owner/model")
    config_json(tmp_path, folders.CONFIG)
    assert describe("owner/model")["family"] == "llama"
    with refused("owner/model/q4/x.gguf has not been downloaded", "hf download owner/model q4/x.gguf"):
        describe("owner/model/q4/x.gguf")
    assert asked == [("owner/model", ["config.json"], False)] * 2 + [("owner/model", None, True)]
    monkeypatch.undo()
    with refused("owner/nowhere/x.gguf has not been downloaded"):
        describe("owner/nowhere/x.gguf")


def test_of_experts_those_count_that_a_token_is_given_to(tmp_path):
    """Qwen3-30B-A3B, of 128 of whose experts 8 are chosen: its published sizes, and what a token reads by hand."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    rest = {"intermediate_size": 6144, "vocab_size": 151936, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}
    found = describe(config_json(tmp_path, {"model_type": "qwen3_moe"} | sizes | experts | rest))
    assert found["parameters"] == 30_532_122_624
    attention = 2048 * 128 * (2 * 32 + 2 * 4) + 2 * 128
    each = attention + 2 * 2048 + 128 * 2048 + 8 * 3 * 768 * 2048
    assert found["parameters_per_token"] == 48 * each + 2048 + 151936 * 2048
    assert found["pass_bytes"] == 2 * found["parameters_per_token"]
    assert 0.25 < found["twins"]["mxfp4"]["part_of_pass"] < 0.28


def test_rows_hit_experts_by_chance():
    """The more there are the more of all experts, and twice the same one counts once."""
    dense = tiny.shape(61, 64, 96, 1, 4, 2, 16, 64)
    mixture = dataclasses.replace(dense.layers[0], feed=Experts(Router(8, 2, "softmax"), 32))
    network = Network(dataclasses.replace(dense, layers=(*dense.layers, mixture)))
    part = network.parts_read(np.array([1, 2, 16]))
    name = "model.layers.1.mlp.experts.up_proj.weight"
    np.testing.assert_allclose(part[name], [1 / 4, 7 / 16, 1 - 0.75**16])
    assert part["model.layers.0.mlp.up_proj.weight"] == 1
    assert part[EMBEDDING] == 0
