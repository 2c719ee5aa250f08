"""config.json: what it means."""

import collections
import dataclasses
import json
import operator
import pathlib

import jax
import pytest
import tiny
from configs import LLAMA, MINIMAL, parse
from refusals import refused
from transformers import CONFIG_MAPPING

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading import config_file
from mlspecqd_jax.network.config import Norm, ShortConv
from mlspecqd_jax.network.families import FAMILIES, config_of
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.network.rope import rope_of
from mlspecqd_jax.weights import tensors


def mixer(config, layer=0):
    return config.layers[layer].mixer


NEEDED = {"deepseek_v2": {"num_experts_per_tok": 2}}  # of which the default is nothing that can be


def windows(config) -> list[int | None]:
    return [layer.mixer.window for layer in config.layers]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_absent_keys_take_the_defaults_of_transformers(tmp_path, family):
    import transformers

    ours = parse(tmp_path, {"model_type": family} | MINIMAL)
    theirs = transformers.CONFIG_MAPPING[family](**MINIMAL)
    gemma = family.startswith("gemma")
    assert len(ours.layers) == 3
    assert mixer(ours).kv_heads == theirs.num_key_value_heads
    if hasattr(theirs, "head_dim"):
        assert mixer(ours).head_dim == mixer(ours).value_dim == theirs.head_dim
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.norm == Norm(theirs.rms_norm_eps, 1.0 if gemma else 0.0)
    assert ours.layers[0].feed.act == (theirs.hidden_activation if gemma else theirs.hidden_act)
    assert ours.layers[0].feed.size == MINIMAL["intermediate_size"]
    assert ours.tied == theirs.tie_word_embeddings == gemma
    rope = theirs.rope_parameters["sliding_attention"] if family == "gemma3_text" else theirs.rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": 10000}
    assert mixer(ours).rope == rope_of(rope, mixer(ours).head_dim)
    assert (mixer(ours).bias, mixer(ours).output_bias, ours.layers[0].feed.bias) == (family == "qwen2", False, False)
    assert bool(mixer(ours).qk_norm) == (family in ("qwen3", "gemma3_text"))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_absent_keys_are_the_family_s(tmp_path, family):
    """Whatever is left to transformers' class is what a config of that class says, and no key is lost on the way to it."""
    described = CONFIG_MAPPING[family]
    given = (
        NEEDED.get(family, {})
        | MINIMAL
        | {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128}
    )
    named = {described.attribute_map.get(key, key): value for key, value in given.items()}
    given = {key: value for key, value in named.items() if key in {field.name for field in dataclasses.fields(described)}}
    ours = parse(tmp_path, {"model_type": family} | given)
    assert ours == config_of(family, **given)
    assert (ours.vocab_size, ours.hidden_size, ours.max_positions, len(ours.layers)) == (97, 512, 128, 3)


def test_the_documents_name_every_family():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert [name for name in (*FAMILIES, *config_file.WRAPPERS) if f"`{name}`" not in text] == []


def test_defaults_that_are_easily_mistaken(tmp_path):
    """The same facts written out, so that they do not rest on transformers alone."""
    llama = parse(tmp_path, {"model_type": "llama"} | MINIMAL)
    assert (mixer(llama).kv_heads, mixer(llama).head_dim, llama.max_positions) == (32, 6, 2048)
    mistral = parse(tmp_path, {"model_type": "mistral"} | MINIMAL)
    assert (mixer(mistral).kv_heads, windows(mistral)) == (8, [4096] * 3)
    assert windows(parse(tmp_path, {"model_type": "mistral", "sliding_window": None} | MINIMAL)) == [None] * 3
    qwen2 = parse(tmp_path, {"model_type": "qwen2", "num_key_value_heads": 4} | MINIMAL)
    assert (mixer(qwen2).head_dim, qwen2.max_positions, windows(qwen2)) == (6, 32768, [None] * 3)
    assert mixer(parse(tmp_path, {"model_type": "qwen3"} | MINIMAL)).head_dim == 128
    gemma2 = parse(tmp_path, {"model_type": "gemma2"} | MINIMAL)
    assert (mixer(gemma2).head_dim, mixer(gemma2).scale, mixer(gemma2).cap) == (256, 1 / 16, 50.0)
    assert (gemma2.logit_cap, gemma2.embed_scale, windows(gemma2)) == (30.0, 192**0.5, [4096, None, 4096])
    gemma3 = parse(tmp_path, {"model_type": "gemma3_text"} | MINIMAL | {"num_hidden_layers": 7})
    assert (mixer(gemma3).cap, gemma3.logit_cap, windows(gemma3)) == (None, None, [4096] * 5 + [None, 4096])
    assert [mixer(gemma3, i).rope.frequencies[64] for i in (0, 5)] == [1e4**-0.5, 1e6**-0.5]


def test_sliding_windows_of_qwen(tmp_path):
    config = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9} | MINIMAL
    assert windows(parse(tmp_path, config | {"max_window_layers": 2})) == [None, None, 9]
    assert windows(parse(tmp_path, config | {"max_window_layers": 3})) == [None] * 3
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert windows(parse(tmp_path, config | {"layer_types": kinds})) == [None, 9, None]


def other_spelling(config: dict) -> dict:
    """Turn rope_theta and rope_scaling into rope_parameters, or the other way round."""
    config = dict(config)
    if config["model_type"] == "gemma3_text":
        everywhere = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
        nearby = {"rope_type": "default", "rope_theta": config.pop("rope_local_base_freq")}
        return config | {"rope_parameters": {"full_attention": everywhere, "sliding_attention": nearby}}
    if "rope_parameters" in config:
        scaling = dict(config.pop("rope_parameters"))
        theta = scaling.pop("rope_theta")
        return config | {"rope_theta": theta, "rope_scaling": scaling}
    scaling = config.pop("rope_scaling", {"rope_type": "default"})
    scaling = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    return config | {"rope_parameters": scaling | {"rope_theta": config.pop("rope_theta", 10000.0)}}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_both_spellings_of_rope_are_one(tmp_path, family):
    config = tiny.FAMILIES[family]
    ours = parse(tmp_path, config)
    assert ours == parse(tmp_path, other_spelling(config))
    rope = config.get("rope_parameters") or config
    plain = rope_of({"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}, mixer(ours).head_dim)
    assert ("rope_scaling" in config) == all(layer.mixer.rope != plain for layer in ours.layers)


def test_rope_scalings(tmp_path):
    llama3 = tiny.FAMILIES["llama3"]
    assert mixer(parse(tmp_path, llama3)).rope == rope_of({"rope_theta": 10000.0} | llama3["rope_scaling"], 12)
    linear = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}
    assert mixer(parse(tmp_path, tiny.FAMILIES["llama_linear"])).rope == rope_of(linear, 8)
    plain = mixer(parse(tmp_path, llama3 | {"rope_scaling": None})).rope
    assert plain.frequencies == tuple(10000.0 ** (-i / 12) for i in range(0, 12, 2))


@pytest.mark.slow
def test_every_model_type_of_transformers_is_read_or_refused(tmp_path):
    """Of those that generate text, its own default config: in one sentence, never a traceback."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as OF_TEXT,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as OF_IMAGES,
    )

    # By default glm4_moe rotates 21 elements of a head, and deepseek_v2 says nothing of how many experts a token has.
    types = {*OF_TEXT, *OF_IMAGES} - {"gemma4_assistant", "glm4_moe", "deepseek_v2"}
    read, said = set(), []
    for kind in sorted(types):
        (tmp_path / "config.json").write_text(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
        try:
            config_file.read_config(tmp_path)
            read.add(kind)
        except InputError as error:
            said.append(str(error))
    assert {len(message.splitlines()) for message in said} == {1}
    assert {kind for kind in (*FAMILIES, *config_file.WRAPPERS) if kind in types} <= read


READ = {
    "HuggingFaceTB--SmolLM2-135M": 134_515_008,
    "Qwen--Qwen2-0.5B": 494_032_768,
    "Qwen--Qwen2.5-1.5B": 1_543_714_304,
    "Qwen--Qwen2.5-7B": 7_615_616_512,
    "Qwen--Qwen3-0.6B": 596_049_920,
    "Qwen--Qwen3-8B": 8_190_735_360,
    "Qwen--Qwen3-30B-A3B": 30_532_122_624,
    "deepseek-ai--DeepSeek-V3": 671_026_419_200,
    "google--gemma-4-26B-A4B": 25_233_141_790,
    "meta-llama--Llama-2-7b-hf": 6_738_415_616,
    "meta-llama--Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama--Meta-Llama-3.1-8B": 8_030_261_248,
    "mistralai--Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai--Mixtral-8x7B-v0.1": 46_702_792_704,
    "openai--gpt-oss-20b": 20_914_757_184,
}


def parameters(config) -> int:
    """Count the parameters from the shapes of each kind of layer: dozens of them take their time."""
    kinds = collections.Counter(config.layers)
    ones = [Network(dataclasses.replace(config, layers=(layer,))).tensors() for layer in kinds]
    outside, *_ = ({name: tensor for name, tensor in one.items() if ".layers." not in name} for one in ones)
    inside = ({name: tensor for name, tensor in one.items() if ".layers." in name} for one in ones)
    return tensors.parameters(outside) + sum(map(operator.mul, kinds.values(), map(tensors.parameters, inside)))


def test_configs_of_real_models_are_read(shared):
    folders = sorted((shared / "configs").iterdir())
    assert [folder.name for folder in folders] == sorted(READ)
    for folder in folders:
        assert parameters(config_file.read_config(folder)) == READ[folder.name], folder.name


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 7]}, "config.json": {"eos_token_id": 2}}, (5, 7)),
        ({"generation_config.json": {"temperature": 0.6}, "config.json": {"eos_token_id": 2}}, (2,)),
        ({"generation_config.json": {"eos_token_id": 0}}, (0,)),
        ({"config.json": {"eos_token_id": None}}, ()),
        ({"generation_config.json": {"eos_token_id": -1}, "config.json": {"eos_token_id": 2}}, ()),  # it says that there is none
        ({"generation_config.json": {"eos_token_id": [5, None, -1, 5, 96, 97, 10**30]}}, (5, 96)),
        ({"generation_config.json": {"eos_token_id": []}, "config.json": {"eos_token_id": 2}}, ()),
        ({}, ()),
    ],
)
def test_ids_that_end_a_text(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert config_file.eos_token_ids(tmp_path, 97) == expected


@pytest.mark.parametrize("ids", [True, "2", 2.0, [2, "3"], [False], [[2]], {"a": 2}])
def test_ids_of_another_type_are_refused(tmp_path, ids):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with refused("generation_config.json", f"eos_token_id is {ids}" if isinstance(ids, list | dict) else repr(ids), "token id"):
        config_file.eos_token_ids(tmp_path, 97)


def test_an_architecture_may_be_a_text_and_keys_of_no_matter_are_not_read(tmp_path):
    assert parse(tmp_path, LLAMA | {"architectures": ["LlamaModel"]}) == parse(tmp_path, LLAMA)  # as it was saved without its head
    odd = {
        "architectures": "LlamaForCausalLM",
        "torch_dtype": 3,
        "id2label": "x",
        "auto_map": [1],
        "num_labels": -1,
        "bos_token_id": {},
    }
    assert parse(tmp_path, LLAMA | odd) == parse(tmp_path, LLAMA)


def test_a_window_of_a_family_without_one_has_no_effect(tmp_path):
    """transformers' Llama attends to everything whatever its config says."""
    odd = {"sliding_window": 5, "layer_types": ["sliding_attention"] * 3, "use_sliding_window": True}
    assert parse(tmp_path, LLAMA | odd) == parse(tmp_path, LLAMA)


def test_a_head_size_is_honoured_by_every_family(tmp_path):
    fields = {family: {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])} for family in FAMILIES}
    of_their_own = [family for family in FAMILIES if "head_dim" in fields[family]]
    assert len(of_their_own) > 15
    for family in ["llama", "mistral", "qwen2", "qwen3", *of_their_own]:
        named = {"model_type": family, "num_key_value_heads": 4, "head_dim": 16, "full_attention_interval": 1}
        config = parse(tmp_path, named | NEEDED.get(family, {}) | MINIMAL)
        mixers = [layer.mixer for layer in config.layers if not isinstance(layer.mixer, ShortConv)]
        assert getattr(mixers[0], "head_dim", 16) == 16  # of latents it is another size


def test_many_layers_take_no_longer_to_tell(tmp_path):
    config = parse(tmp_path, LLAMA | {"num_hidden_layers": 1024})
    names = list(Network(config).tensors())
    assert len([name for name in names if name.endswith("mlp.up_proj.weight")]) == 1024
    assert names[:2] == ["lm_head.weight", "model.embed_tokens.weight"]
    few = dataclasses.replace(config, hidden_size=64, layers=config.layers[:2])
    shapes = {name: tensor.shape for name, tensor in Network(few).tensors().items()}
    assert shapes == {name: leaf.shape for name, leaf in jax.eval_shape(lambda: Network(few).init(0)).items()}
