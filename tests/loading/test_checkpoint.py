"""Converted checkpoints: the same parameters back in any dtype, mapped rather than copied, and refused when damaged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mlspecqd_jax as mlsd
from mlspecqd_jax import cli
from mlspecqd_jax.loading import checkpoint, config_file, huggingface, models
from mlspecqd_jax.loading import model as model_module
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights import quantization
from mlspecqd_jax.weights.quantized_array import QuantizedArray

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = tiny.FAMILIES["qwen3_bias"] | {"num_hidden_layers": 1}
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def network(tmp_path):
    return Network(config_file.read_config(tiny.write_checkpoint(tmp_path / "source", CONFIG, tiny.weights(CONFIG))))


def convert(tmp_path, network, dtype="bfloat16"):
    params = huggingface.read_params(tmp_path / "source", network, jnp.dtype(dtype), None)
    checkpoint.save(tmp_path / "converted", tmp_path / "source", params)
    return params


def restore(tmp_path, network, dtype="bfloat16"):
    return checkpoint.restore(tmp_path / "converted", network, jnp.dtype(dtype), None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_parameters_come_back_bit_for_bit(tmp_path, network, dtype):
    params = convert(tmp_path, network, dtype)
    again = restore(tmp_path, network, dtype)
    assert list(again) == list(params)
    for name, leaf in again.items():
        assert leaf.dtype == params[name].dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), np.asarray(params[name], np.float32))
    assert checkpoint.is_converted(tmp_path / "converted")
    assert not checkpoint.is_converted(tmp_path / "source")


def test_another_dtype_than_the_stored_one(tmp_path, network):
    params = convert(tmp_path, network, "float32")
    for name, leaf in restore(tmp_path, network, "bfloat16").items():
        np.testing.assert_array_equal(leaf, params[name].astype(jnp.bfloat16))


def test_files_stay_as_they_are_when_parameters_are_donated(tmp_path, network):
    """On the CPU a parameter is the file's pages: a program that overwrites its input must get a copy."""
    convert(tmp_path, network)
    before = np.asarray(restore(tmp_path, network)[NAME]).copy()
    changed = jax.jit(lambda x: x.at[0].set(3), donate_argnums=0)(restore(tmp_path, network)[NAME])
    assert np.all(np.asarray(changed[0]) == 3)
    np.testing.assert_array_equal(restore(tmp_path, network)[NAME], before)


def cut(folder):
    (folder / "0.0").write_bytes((folder / "0.0").read_bytes()[:-2])


def edit(**changes):
    def apply(folder):
        layout = json.loads((folder / ".zarray").read_text())
        (folder / ".zarray").write_text(json.dumps(layout | changes))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "damaged"),
        (lambda folder: (folder / "0.0").unlink(), "0.0"),
        (lambda folder: (folder / ".zarray").unlink(), ".zarray"),
        (lambda folder: (folder / ".zarray").write_text("{"), "damaged"),
        (lambda folder: (folder / ".zarray").write_text("{}"), "'shape'"),
        (edit(shape=[36, 51]), "asks for [51, 36]"),
        (edit(chunks=[17, 36]), "in pieces"),
        (edit(compressor={"id": "zstd", "level": 1}), "compressed"),
        (edit(dtype="words"), "words"),
    ],
)
def test_a_damaged_one_is_refused(tmp_path, network, damage, words):
    convert(tmp_path, network)
    damage(tmp_path / "converted" / checkpoint.WEIGHTS / NAME)
    with pytest.raises(ValueError, match=r"converted is damaged \(.*\); convert the model again") as caught:
        restore(tmp_path, network)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def leaves(params):
    return {name: leaf for name, leaf in params.items() if isinstance(leaf, QuantizedArray)}


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("format", "tied"), [("mxfp4", False), pytest.param("mxfp6_e3m2", True, marks=pytest.mark.slow)])
def test_a_stored_draft_comes_back_bit_for_bit(tmp_path, monkeypatch, format, tied):
    config = CONFIG | {"tie_word_embeddings": tied}
    source = mlsd.load(tiny.write_checkpoint(tmp_path / "source", config, tiny.weights(config)))
    model = mlsd.load(mlsd.convert(tmp_path / "source", tmp_path / "converted", draft=format))
    expected = source.quantized(format)
    assert model.drafts == (expected.recipe,)
    stored = {file.parent.name for file in (tmp_path / "converted" / checkpoint.DRAFTS / format).glob("*/.zarray")}
    kinds = {name: "codes" if leaf.format.startswith("mxfp8") else "packed" for name, leaf in leaves(expected.params).items()}
    assert stored == {f"{name}.{part}" for name, kind in kinds.items() for part in (kind, "scales")}
    other = model.quantized(format, scale_rule="even")
    monkeypatch.setattr(model_module, "quantize_params", None)  # nothing is quantized again
    twin = model.quantized(format).params
    assert_equal(twin, expected.params)
    assert all(leaf is model.params[name] for name, leaf in twin.items() if name not in leaves(twin))
    monkeypatch.undo()
    assert_equal(other.params, source.quantized(format, scale_rule="even").params)


@pytest.mark.parametrize("calibrate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_draft_of_so_many_bits_is_stored_with_the_formats_that_were_found(tmp_path, monkeypatch, network, calibrate):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = {NAME: "nvfp4", "lm_head.weight": "int8", "*": None}
    search = model_module.precision_search
    monkeypatch.setattr(search, "policy_for", lambda *arguments: found)
    expected = mlsd.load(tmp_path / "source").quantized(bits=5.5, calibrate=calibrate)
    mlsd.convert(tmp_path / "source", tmp_path / "converted", draft="auto5.5", calibrate=calibrate)
    monkeypatch.setattr(search, "policy_for", None)  # nothing is searched again
    model = mlsd.load(tmp_path / "converted")
    twin = model.quantized(bits=5.5, calibrate=calibrate)
    assert twin.card.name.endswith("@auto5.5-calibrated" if calibrate else "@auto5.5")
    assert [leaves(twin.params)[name].format for name in (NAME, "lm_head.weight")] == ["nvfp4", "int8"]
    assert_equal(twin.params, expected.params)
    with pytest.raises(TypeError):
        model.quantized(bits=5.5, calibrate=not calibrate)
    marker = tmp_path / "converted" / checkpoint.MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"bits": [[5.5]]}))
    with pytest.raises(ValueError, match=r"damaged \(bits is .*convert the model again"):
        mlsd.load(tmp_path / "converted")


@pytest.mark.slow
def test_a_stored_draft_with_a_byte_for_six_bits_is_refused(tmp_path, network):
    """As earlier versions wrote it; drafts of other formats beside it are read."""
    mlsd.convert(tmp_path / "source", tmp_path / "converted", draft="mxfp6_e2m3")
    stored = tmp_path / "converted" / checkpoint.DRAFTS / "mxfp6_e2m3"
    (stored / f"{NAME}.packed").rename(stored / f"{NAME}.codes")
    model = mlsd.load(tmp_path / "converted")
    with pytest.raises(
        ValueError, match=r"converted holds .*up_proj.* in mxfp6_e2m3 with a byte .*; convert the model again"
    ) as caught:
        model.quantized("mxfp6_e2m3")
    assert len(str(caught.value).splitlines()) == 1
    assert model.quantized("mxfp6_e3m2").params[NAME].format == "mxfp6_e3m2"


def test_a_stored_draft_is_not_read_unless_asked_for(tmp_path, network):
    assert cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "converted"), "--draft", "mxfp4"]) == 0
    file = tmp_path / "converted" / checkpoint.DRAFTS / "mxfp4" / f"{NAME}.scales" / "0.0"
    file.write_bytes(file.read_bytes()[:-1])
    model = mlsd.load(tmp_path / "converted")
    assert model.quantized("mxfp8_e4m3").params[NAME].format == "mxfp8_e4m3"
    with pytest.raises(ValueError, match=r"converted is damaged \(.*\); convert the model again"):
        model.quantized()


@pytest.mark.slow
def test_dtypes_that_a_stored_draft_serves(tmp_path, network):
    """Its own, and float32, in which the weights have the same values and so the same codes."""
    mlsd.convert(tmp_path / "source", tmp_path / "converted", draft="mxfp4")
    bfloat16, float32, float16 = (mlsd.load(tmp_path / "converted", dtype=dtype) for dtype in models.DTYPES)
    assert (bfloat16.drafts, float32.drafts, float16.drafts) == (bfloat16.drafts, bfloat16.drafts, ())
    assert len(bfloat16.drafts) == 1
    again = quantization.quantize_params(float32.params, float32.network.tensors(), policy=dict(bfloat16.drafts[0].policy))
    assert_equal(leaves(float32.quantized().params), leaves(again))
    assert leaves(float16.quantized().params)


def test_a_draft_of_an_earlier_version_is_read_for_what_it_is(tmp_path, network, monkeypatch):
    """It was cast without exceptions: the twin of today's default is another one, and made from the weights."""
    source = mlsd.load(tmp_path / "source")
    earlier = source.quantized(policy={})
    checkpoint.save(tmp_path / "converted", source.folder, source.params, {earlier.recipe: earlier.params})
    marker = tmp_path / "converted" / checkpoint.MARKER
    marker.write_text(json.dumps({key: value for key, value in json.loads(marker.read_text()).items() if key != "policies"}))
    model = mlsd.load(tmp_path / "converted")
    assert_equal(leaves(model.quantized().params), leaves(source.quantized().params))
    monkeypatch.setattr(model_module, "quantize_params", None)
    assert_equal(leaves(model.quantized(policy={}).params), leaves(earlier.params))


def test_damaged_policies_are_refused(tmp_path, network):
    mlsd.convert(tmp_path / "source", tmp_path / "converted", draft="mxfp4")
    marker = tmp_path / "converted" / checkpoint.MARKER
    good = json.loads(marker.read_text())
    for policies in ([], {"mxfp4": "lm_head"}, {"mxfp4": {"lm_head.weight": "int3"}}):
        marker.write_text(json.dumps(good | {"policies": policies}))
        with pytest.raises(ValueError, match=r"converted is damaged \(.*\); convert the model again"):
            mlsd.load(tmp_path / "converted").quantized(policy={"lm_head.weight": "int3"})


def test_folders_without_drafts(tmp_path, network):
    mlsd.convert(tmp_path / "source", tmp_path / "converted")
    marker = tmp_path / "converted" / checkpoint.MARKER
    marker.write_text(json.dumps({key: value for key, value in json.loads(marker.read_text()).items() if key != "drafts"}))
    model = mlsd.load(tmp_path / "converted")  # as an earlier version wrote it
    assert model.drafts == ()
    assert_equal(model.quantized().params[NAME], quantization.quantize_params(model.params, model.network.tensors())[NAME])


def test_an_unknown_draft_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="'int3' is not a format for weights; give one of mxfp4"):
        mlsd.convert("demo", tmp_path / "converted", draft="int3")
    assert not list(tmp_path.iterdir())
