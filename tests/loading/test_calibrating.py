"""Calibrated twins: what they are made from, that they are kept, go on where they were, and are told from uncalibrated ones."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import calibrating, checkpoint
from mlspecqd_jax.loading import model as model_module
from mlspecqd_jax.network import layers
from mlspecqd_jax.network.moments import second_moments
from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# All weights of a layer have one shape, so that they are one program.
CONFIG = tiny.FAMILIES["qwen3_bias"] | {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 16}
CONFIG |= {"num_hidden_layers": 2, "max_window_layers": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrating, "TEXTS", 4)
    monkeypatch.setattr(calibrating, "POSITIONS", 24)
    return tmp_path / "cache" / "mlspecqd-jax" / "calibration"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, tiny.weights(CONFIG))


@pytest.fixture(scope="module")
def model(folder):
    return mlsd.load(folder)


def leaves(model):
    return {name: leaf for name, leaf in model.params.items() if isinstance(leaf, QuantizedArray)}


def error(w, h, leaf) -> float:
    e = np.asarray(dequantize(leaf, jnp.float32) - w.astype(jnp.float32), np.float64)
    return np.einsum("nk,kl,nl->", e, np.asarray(h, np.float64), e)


def equal(one, other) -> bool:
    same = jax.tree.map(np.array_equal, one, other)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(jax.tree.leaves(same))


def test_moments_are_those_of_what_each_weight_multiplies(model, monkeypatch):
    """All that `linear` is given in one pass of the whole network, added up in float64."""
    tokens = jax.random.randint(jax.random.key(0), (3, 11), 0, 97)
    found = {}
    counted = jnp.arange(33.0).reshape(3, 11) % 3
    for moments in second_moments(model.network, model.params, tokens, counted):
        found |= moments
    given = []

    def linear(x, w, **how):
        given.append(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))
        return plain(x, w, **how)

    plain = layers.linear
    monkeypatch.setattr(layers, "linear", linear)
    with model.network.module(model.params) as module, jax.disable_jit():  # layers of equal parts are traced once
        module(tokens, jnp.zeros(3, jnp.int32), None)
    order = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in order] + [HEAD]
    assert found.keys() == set(names)
    for name, x in zip(names, given, strict=True):
        expected = x.T @ (x * np.asarray(counted).reshape(-1, 1))
        np.testing.assert_allclose(found[name], expected, rtol=0.02, atol=0.02 * np.abs(expected).max())
    assert all(moments.dtype == jnp.float32 for moments in found.values())


@pytest.mark.slow
def test_a_twin_whose_outputs_are_nearer(model, cache):
    twin = model.quantized("mxfp4", calibrate=True)
    assert twin.card.name == f"{model.card.name}@mxfp4-calibrated"
    assert twin.recipe == dataclasses.replace(model.quantized("mxfp4").recipe, calibrated=True)
    assert leaves(twin).keys() == leaves(model.quantized("mxfp4")).keys()
    assert twin.quantized("mxfp4", calibrate=True) is twin
    tokens = calibrating._text(cache / "text.npy", model.network, model.params, model.first_token)
    for moments in second_moments(model.network, model.params, tokens, jnp.ones(tokens.shape)):
        for name, h in moments.items():
            w = model.params.get(name, model.params[EMBEDDING])
            assert error(w, h, twin.params[name]) < error(w, h, quantize(w, "mxfp4"))


def test_what_was_interrupted_goes_on_and_gives_the_same_bits(model, monkeypatch, tmp_path, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    whole = model.quantized(calibrate=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = []

    def rounded(name, *rest):
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(name)
        return original(name, *rest)

    original = calibrating._rounded
    monkeypatch.setattr(calibrating, "_rounded", rounded)
    with pytest.raises(KeyboardInterrupt):
        model.quantized(calibrate=True)
    (folder,) = cache.iterdir()
    assert len(list(folder.glob("*.npz"))) == 9
    first, done[:] = set(done), []
    monkeypatch.setattr(calibrating, "own_text", None)  # the text is kept too
    assert equal(leaves(model.quantized(calibrate=True)), leaves(whole))
    assert not first & set(done)
    assert first | set(done) == set(leaves(whole))
    assert not list(folder.glob(".*"))


def test_what_is_kept_is_used_by_its_weights_alone_and_made_again_where_it_is_damaged(model, monkeypatch, cache):
    made = []
    original = calibrating._rounded
    monkeypatch.setattr(calibrating, "_rounded", lambda *arguments: made.append(arguments[0]) or original(*arguments))
    twin = model.quantized(calibrate=True)
    number = len(made)
    assert equal(leaves(model.quantized(calibrate=True)), leaves(twin))
    assert len(made) == number == len(leaves(twin))
    # Another policy shares what is alike in it.
    model.quantized(policy={HEAD: None}, calibrate=True)
    assert len(made) == number
    (folder,) = cache.iterdir()
    damaged, cut, *_ = sorted(folder.glob("*.npz"))
    damaged.write_bytes(b"PK")
    cut.write_bytes(cut.read_bytes()[:-100])
    assert equal(leaves(model.quantized(calibrate=True)), leaves(twin))
    assert len(made) == number + 2
    other = dataclasses.replace(model, params=model.params | {EMBEDDING: model.params[EMBEDDING].at[3, 5].add(1)})
    other.quantized(policy={"model.layers.*": None}, calibrate=True)
    assert len(list(cache.iterdir())) == 2


def test_the_cache_does_not_grow_beyond_its_size(model, monkeypatch, cache):
    (cache / "old").mkdir(parents=True)
    (cache / "old" / "a.npz").write_bytes(bytes(1000))
    os.utime(cache / "old", (1, 1))
    monkeypatch.setattr(calibrating, "LARGEST", 1000)
    model.quantized(policy={"model.layers.*": None}, calibrate=True)
    assert [folder.name for folder in cache.iterdir()] != ["old"]
    assert len(list(cache.iterdir())) == 1


def test_moments_that_are_not_finite_leave_the_cast(model, capsys, monkeypatch):
    monkeypatch.setattr(calibrating, "influence", lambda h: None)
    twin = model.quantized(calibrate=True)
    assert equal(leaves(twin), leaves(model.quantized()))
    assert "lm_head.weight: what it reads has no finite second moments; rounded as without calibration" in capsys.readouterr().err


def test_a_converted_folder_tells_the_calibrated_twin_from_the_other(folder, model, tmp_path, monkeypatch):
    converted = mlsd.load(mlsd.convert(folder, tmp_path / "converted", draft="mxfp4", calibrate=True))
    twin = model.quantized(calibrate=True)
    assert converted.drafts == (twin.recipe,)
    marker = json.loads((tmp_path / "converted" / checkpoint.MARKER).read_text())
    assert (marker["drafts"], marker["calibrated"]) == ([], ["mxfp4"])
    monkeypatch.setattr(model_module, "calibrated_weights", None)  # nothing is calibrated again
    assert equal(leaves(converted.quantized(calibrate=True)), leaves(twin))
    assert equal(leaves(converted.quantized()), leaves(model.quantized()))
    assert not equal(leaves(converted.quantized()), leaves(twin))
    plain = mlsd.load(mlsd.convert(folder, tmp_path / "plain", draft="mxfp4"))
    assert [recipe.calibrated for recipe in plain.drafts] == [False]
    (tmp_path / "plain" / checkpoint.MARKER).write_text(json.dumps(marker | {"calibrated": ["int3"]}))
    with pytest.raises(ValueError, match=r"is damaged \(calibrated is \['int3'\] in mlspecqd.json\); convert the model again"):
        mlsd.load(tmp_path / "plain")


@pytest.mark.slow
def test_drafts_change_no_token(model):
    prompts = [[5, 7, 11], [13]]
    plain = mlsd.generate(mlsd.stack(model), prompts, max_new_tokens=12)
    drafted = mlsd.generate(mlsd.stack(model, (model.quantized(calibrate=True), 3)), prompts, max_new_tokens=12)
    assert drafted.tokens == plain.tokens
    assert drafted.report["levels"][0]["drafted"] > 0


@pytest.mark.slow
def test_together_with_bits(model, monkeypatch):
    found = {name: None if ".0." in name else "mxfp4" for name in leaves(model.quantized())}
    monkeypatch.setattr(model_module.precision_search, "policy_for", lambda *arguments: found)
    twin = model.quantized(bits=6, calibrate=True)
    assert {name: leaf.format for name, leaf in leaves(twin).items()} == {name: format for name, format in found.items() if format}
    assert twin.card.name.endswith("@auto6-calibrated")
    assert not equal(leaves(twin), leaves(model.quantized(bits=6)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibrate": 1}, "calibrate is 1, but must be True or False"),
        ({"calibrate": True, "format": None}, "format is None, but must be the name of a format"),
        ({"calibrate": True, "scale_rule": "most"}, "'most' is not a scale rule"),
        ({"calibrate": True, "format": "int4", "scale_rule": "ceil"}, "of MX formats alone"),
        ({"calibrate": True, "policy": {"no.*": None}}, "matches no weight that can be quantized"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(model, cache, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.quantized(**arguments)
    assert not cache.exists()


def test_quantized_models_and_conversions_without_a_draft_are_refused(model, folder, tmp_path):
    with pytest.raises(ValueError, match=r"is quantized already .*; quantize the original model instead"):
        model.quantized().quantized(calibrate=True)
    with pytest.raises(ValueError, match=r"is quantized already .*, calibrated\); quantize the original model instead"):
        model.quantized(calibrate=True).quantized()
    with pytest.raises(ValueError, match="calibrate is for the weights of a draft, and there is none; give draft"):
        mlsd.convert(folder, tmp_path / "out", calibrate=True)
