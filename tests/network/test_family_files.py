"""Families from a file in transformers' layout to its logits, whatever the windows, and to tokens, whatever drafts."""

import functools
import json
import warnings

import family_files
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from recorded import error
from refusals import refused

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import config_file, huggingface
from mlspecqd_jax.loading.quantized import twin
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.tensors import HEAD

TOLERANCE = 2e-4  # of the largest logit, in f32
families = pytest.mark.parametrize("family", list(family_files.CONFIGS))
# Of the kinds of parts that families are made of, one each; the others' windows are among the slow tests.
SOME = (
    *("gemma", "granite", "olmo", "smollm3", "phi3_long", "glm4", "cohere2", "olmo3", "exaone4_all", "granite_swa", "gpt2", "gptj"),
    *("falcon_heads", "stablelm_parallel", "nemotron", "apertus", "qwen2_moe", "gpt_oss", "glm4_moe", "llama4", "mistral3"),
    *("gemma4", "deepseek_v3", "lfm2"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda family: family_files.write(root / family, family))


@pytest.fixture(scope="module")
def models(folder):
    """A function from a family's name to (network, float32 parameters), read from its file."""

    @functools.cache
    def read(family):
        network = Network(config_file.read_config(folder(family)))
        with warnings.catch_warnings(action="ignore"):  # of what sees images
            params = huggingface.read_params(folder(family), network, jnp.dtype("float32"), None)
        return network if HEAD in params else Network(network.config), params

    return read


@functools.partial(quick_jit, static_argnums=0)
def apply(network, params, tokens, start, cache):
    return network(params, tokens, start, cache)[:2]


def windows(network, params, width, starts):
    """Return the logits [T, V] last given at each position by windows of a width, some of which go back."""
    network, tokens = network.reaching(9), family_files.tokens()
    cache = network.init_cache(params, 1, family_files.TOKENS + 4)
    logits = np.full((family_files.TOKENS, family_files.VOCAB), np.nan, np.float32)
    for start in starts:
        out, cache = apply(network, params, tokens[:, start : start + width], np.array([start], np.int32), cache)
        logits[start : start + width] = out[0]
    return logits


@pytest.mark.parametrize(
    "family", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in family_files.CONFIGS]
)
def test_logits_of_windows_that_go_back(models, family):
    found = windows(*models(family), 7, (0, 5, 3, 10))
    assert error(found, family_files.recorded(family)[1]) <= TOLERANCE


@families
@pytest.mark.slow
def test_logits_of_one_pass_and_of_other_windows(models, family):
    network, params = models(family)
    expected = family_files.recorded(family)[1]
    assert error(apply(network, params, family_files.tokens(), np.zeros(1, np.int32), None)[0][0], expected) <= TOLERANCE
    assert error(windows(network, params, 1, range(17)), expected) <= TOLERANCE
    assert error(windows(network, params, 3, (0, 3, 2, 5, 8, 6, 9, 12, 14)), expected) <= TOLERANCE


# What holds a language model beside what sees images is that language model once it is read.
OF_TEXT_ALONE = [name for name in family_files.GENERATED.values() if "vision_config" not in family_files.COMPARED[name]]
OF_TEXT_ALONE += ["gemma4_experts"]  # whose text alone is not among them
# Whose parts others have.
OF_PARTS_OF_OTHERS = ("gemma4_unified", "deepseek_v2", "glm4_moe_lite", "youtu")
# Those of the first are drafted for in test_states.py.
OF_PARTS_OF_OTHERS += ("qwen3_5", "qwen3_next", "qwen3_5_moe", "lfm2_moe", "lfm3")


@pytest.mark.parametrize(
    "family",
    [
        name if name in OF_TEXT_ALONE and name not in OF_PARTS_OF_OTHERS else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in family_files.GENERATED.values()
    ],
)
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_quickly")
def test_drafts_change_no_token(folder, family):
    model = mlsd.load(folder(family), dtype="float32")
    settings = {"max_new_tokens": 12, "stop_token_ids": [], "frequency_penalty": 2.0}
    prompts = [[3, 1, 4, 1, 5, 9], [2, 7]]
    plain = mlsd.generate(mlsd.stack(model), prompts, **settings)
    for name, draft in family_files.STACKS.items():
        drafted = mlsd.generate(mlsd.stack(model, draft(model)), prompts, **settings)
        assert drafted.tokens == plain.tokens, name
        assert name != "itself" or drafted.report["levels"][0]["acceptance_rate"] == 1


def test_every_tensor_of_a_file_counts(models, folder):
    """A tensor of the language model that was read and not used would move no logit."""
    for family in ("cohere_norms", "glm4", "ernie4_5"):
        network, params = models(family)
        reference = windows(network, params, 7, (0, 5, 10))
        for name in (name for name in params if ".layers.1." in name):
            moved = windows(network, params | {name: -params[name]}, 7, (0, 5, 10))
            assert error(moved, reference) > 1e-3, name


@pytest.mark.parametrize("family", ["gpt2", "apertus"])
def test_a_converted_family_is_what_it_was(folder, family, tmp_path):
    """Under names, fused and transposed tensors, and numbers without a shape, of its own."""
    model = mlsd.load(folder(family), dtype="float32")
    again = mlsd.load(mlsd.convert(folder(family), tmp_path / "converted", dtype="float32"), dtype="float32")
    assert again.network == model.network
    for name, leaf in model.params.items():
        np.testing.assert_array_equal(again.params[name], leaf)


@pytest.mark.parametrize("family", ["cohere", "olmo", "nemotron", "gemma"])
def test_a_twin_s_weights_are_told_from_another_s(models, family):
    """Weights times the norm before them, wherever a family has it."""
    network, params = models(family)
    leaves = {name: np.asarray(leaf) for name, leaf in params.items()}
    twin.refuse_unlike(leaves, network, params)
    feed = "gate_proj" if "model.layers.1.mlp.gate_proj.weight" in leaves else "up_proj"
    for name in ("self_attn.k_proj", f"mlp.{feed}"):
        name = f"model.layers.1.{name}.weight"
        with refused(name, "off the model's"):
            twin.refuse_unlike(leaves | {name: -leaves[name]}, network, params)


def test_scaled_ropes_are_chosen_by_the_model_alone(tmp_path):
    """By its number of positions, not by a text's length, as which earlier logits would change."""
    (tmp_path / "config.json").write_text(json.dumps(family_files.CONFIGS["phi3_long"]))
    long = config_file.read_config(tmp_path).layers[0].mixer.rope
    (tmp_path / "config.json").write_text(json.dumps(family_files.CONFIGS["phi3_long"] | {"max_position_embeddings": 16}))
    short = config_file.read_config(tmp_path).layers[0].mixer.rope
    assert long is not None
    assert short is not None
    np.testing.assert_allclose(np.array(short.frequencies) / np.array(long.frequencies), [2.0, 3 / 1.1, 4 / 1.2])
    assert (long.magnitude, short.magnitude) == ((1 + np.log(640 / 16) / np.log(16)) ** 0.5, 1.0)


def test_the_names_that_older_files_have_for_a_rope(tmp_path):
    config = family_files.CONFIGS["phi3_long"]
    for kind in ("su", "yarn", "longrope"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": config["rope_scaling"] | {"type": kind}}))
        found = config_file.read_config(tmp_path)
        assert found.layers[0].mixer.rope.magnitude > 1


@families
@pytest.mark.torch
def test_live_logits(folder, family, tmp_path):
    pytest.importorskip("torch")
    import record_reference_logits

    config = family_files.CONFIGS[family]
    shapes, expected = family_files.recorded(family)
    assert record_reference_logits.written(config, tmp_path) == shapes
    assert config_file.read_config(tmp_path) == config_file.read_config(folder(family))  # as transformers writes it
    assert error(record_reference_logits.logits(folder(family), config), expected) <= TOLERANCE
