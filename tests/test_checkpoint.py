"""Converted checkpoints: the same parameters back in any dtype, mapped rather than copied, and refused when damaged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mlspecqd_jax import checkpoint, huggingface
from mlspecqd_jax.transformer import LanguageModel

CONFIG = tiny.FAMILIES["qwen3_bias"] | {"num_hidden_layers": 1}
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def network(tmp_path):
    return LanguageModel(huggingface.read_config(tiny.write_checkpoint(tmp_path / "source", CONFIG, tiny.weights(CONFIG))))


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
