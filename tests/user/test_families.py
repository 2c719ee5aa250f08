"""Gemma from a folder to tokens: exact with every draft, also converted, and as the language model of a multimodal one."""

import json
import pathlib
import warnings

import jax
import numpy as np
import pytest
import tiny

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import config_file
from mlspecqd_jax.loading.description import describe

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7], [31, 41, 59]]
families = pytest.mark.parametrize("family", ["gemma2", "gemma3"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("gemma")
    return lambda family: tiny.write_family(root / family, family)


def tokens(*stack, **settings):
    """Generate; the penalty keeps random models from saying one thing over and over."""
    settings = {"max_new_tokens": 24, "stop_token_ids": [], "frequency_penalty": 2.0} | settings
    return mlsd.generate(mlsd.stack(*stack), PROMPTS, **settings)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.slow
def test_drafts_change_no_token(folder, family):
    model = mlsd.load(folder(family))
    twin = model.quantized()
    for temperature in (0, 1):
        plain = tokens(model, temperature=temperature)
        assert len(set(plain.tokens[0])) > 4
        nested = tokens(model, (twin, 4), (mlsd.prompt_lookup(), 2), temperature=temperature)
        assert nested.tokens == plain.tokens
        assert nested.report["levels"][0]["accepted"] > 0


@families
def test_a_twin_casts_the_linear_layers_and_the_head(folder, family):
    model = mlsd.load(folder(family), dtype="float32")
    twin = model.quantized(policy={})
    cast = {name for name, leaf in twin.params.items() if leaf is not model.params.get(name)}
    assert cast == {name for name in model.params if name.endswith("_proj.weight")} | {"lm_head.weight"}


def multimodal(folder: pathlib.Path, names: dict[str, str]) -> pathlib.Path:
    """Write Gemma 3 as the language model of a model that sees images; `names` are prefixes in the file."""
    text, tensors = tiny.FAMILIES["gemma3"], tiny.weights(tiny.FAMILIES["gemma3"], "gemma3")
    keys = {key: value for key, value in text.items() if key not in ("architectures", "vocab_size")}
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"hidden_size": 8}}
    config |= {"text_config": keys | {"vocab_size": text["vocab_size"], "eos_token_id": [1, 5]}}
    prefixed = {}
    for name, value in tensors.items():
        old = next(prefix for prefix in names if name.startswith(prefix))
        prefixed[names[old] + name.removeprefix(old)] = value
    for name in ("vision_tower.vision_model.embeddings.patch_embedding.weight", "multi_modal_projector.mm_soft_emb_norm.weight"):
        prefixed[names["vision."] + name] = np.ones(3, np.float32)
    return tiny.write_checkpoint(folder, config, prefixed)


@pytest.mark.parametrize(
    "names",
    [
        {"model.": "language_model.model.", "vision.": ""},
        {"model.": "model.language_model.", "vision.": "model."},
    ],
    ids=["first files", "later files"],
)
def test_the_language_model_of_a_multimodal_one(folder, tmp_path, names):
    text = mlsd.load(folder("gemma3"), dtype="float32")
    with pytest.warns(UserWarning, match=r"left out what this model does not use: .*multi_modal_projector.*vision_tower") as warned:
        model = mlsd.load(multimodal(tmp_path / "model", names), dtype="float32")
    assert len(warned) == 1
    assert model.network == text.network
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, text.params))
    assert model.card.eos_token_ids == (1, 5)
    assert describe(tmp_path / "model")["family"] == "gemma3"
    with pytest.warns(UserWarning, match="left out"):
        converted = mlsd.convert(tmp_path / "model", tmp_path / "converted", dtype="float32")
    with warnings.catch_warnings(action="error"):
        assert mlsd.load(converted, dtype="float32").network == text.network


def test_a_head_of_its_own_survives_conversion(tmp_path):
    """Gemma's config.json need not say that head and embedding are one, so a converted one must say that they are not."""
    config, tensors = tiny.FAMILIES["gemma3"], tiny.weights(tiny.FAMILIES["gemma3"])
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    tiny.write_checkpoint(tmp_path / "model", config, tensors)
    with pytest.warns(UserWarning, match="holds another one, which is used"):
        model = mlsd.load(tmp_path / "model", dtype="float32")
    with pytest.warns(UserWarning, match="holds another one, which is used"):
        again = mlsd.load(mlsd.convert(tmp_path / "model", tmp_path / "converted", dtype="float32"), dtype="float32")
    assert not model.network.config.tied
    assert again.network == model.network
    np.testing.assert_array_equal(again.params["lm_head.weight"], tensors["lm_head.weight"])


def test_what_a_text_config_leaves_out_is_the_default(tmp_path):
    """Files of the hub write no vocabulary size and no number of heads where these are the class's own."""
    text = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "hidden_size": 2560,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    config = config_file.read_config(tmp_path)
    mixers = [layer.mixer for layer in config.layers]
    assert (config.vocab_size, config.tied, mixers[0].heads, mixers[0].kv_heads, mixers[0].head_dim) == (262208, True, 8, 4, 256)
    assert [mixer.window for mixer in mixers] == [4096] * 5 + [None, 4096]
    assert mixers[5].rope.frequencies[0] == 1 / 8
    assert mixers[0].rope.frequencies[0] == 1
    assert mixers[5].rope.frequencies[64] == 1e6**-0.5 / 8
    assert mixers[0].rope.frequencies[64] == 1e4**-0.5
