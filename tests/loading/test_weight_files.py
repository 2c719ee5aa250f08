"""Which tensor of which file is which parameter: heads, names, indices, and what is left out or refused."""

import contextlib
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused
from safetensors.numpy import load_file, save_file

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading.description import describe
from mlspecqd_jax.network.network import Network

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TIED = tiny.FAMILIES["llama3"] | {"num_hidden_layers": 1}
UNTIED = TIED | {"tie_word_embeddings": False}
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def weights(config=TIED, **change):
    tensors = tiny.weights(config) | {name.replace("__", "."): value for name, value in change.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def load(folder):
    return mlsd.load(folder, dtype="float32")


def same_function(model, other):
    """One network with equal parameters."""
    assert model.network == other.network
    assert list(model.params) == list(other.params)
    jax.tree.map(np.testing.assert_array_equal, model.params, other.params)


@contextlib.contextmanager
def warned(*words):
    """Expect one warning, in one line, that holds all of the words; none where no words are given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = [str(w.message) for w in caught]
    assert len(told) == bool(words), told
    for message in told:
        assert all(word in message for word in words), message
        assert len(message.splitlines()) == 1


# Heads and embeddings

OTHER = tiny.weights(UNTIED, "another")[HEAD]


def test_a_trained_head_of_a_tied_config_is_used(tmp_path):
    tiny.write_checkpoint(tmp_path / "tied", TIED, weights(lm_head__weight=OTHER))
    with warned(str(tmp_path / "tied"), "lm_head.weight", '"tie_word_embeddings": false'):
        model = load(tmp_path / "tied")
    untied = load(tiny.write_checkpoint(tmp_path / "untied", UNTIED, weights(lm_head__weight=OTHER)))
    assert not model.network.config.tied
    same_function(model, untied)
    np.testing.assert_array_equal(model.params[HEAD], OTHER)


def test_a_conversion_keeps_a_trained_head(tmp_path):
    tiny.write_checkpoint(tmp_path / "tied", TIED, weights(lm_head__weight=OTHER))
    with warned("lm_head.weight"):
        mlsd.convert(tmp_path / "tied", tmp_path / "converted", dtype="float32", draft="mxfp4")
    with warned():
        converted = load(tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["tie_word_embeddings"] is False
    original = load(tmp_path / "tied")
    same_function(converted, original)
    same_function(converted.quantized(), original.quantized())


def test_an_equal_head_of_a_tied_config_is_kept_once(tmp_path):
    tiny.write_checkpoint(tmp_path, TIED, weights(lm_head__weight=tiny.weights(TIED)[EMBEDDING]))
    with warned():
        model = load(tmp_path)
    assert model.network.config.tied
    assert HEAD not in model.params


def test_a_head_stands_for_the_embedding_of_a_tied_config(tmp_path):
    embedding = tiny.weights(TIED)[EMBEDDING]
    tensors = {name: value for name, value in weights(lm_head__weight=embedding).items() if name != EMBEDDING}
    model = load(tiny.write_checkpoint(tmp_path / "head", TIED, tensors))
    same_function(model, load(tiny.write_checkpoint(tmp_path / "embedding", TIED, weights())))
    assert list(model.params) == list(model.network.tensors())


@pytest.mark.parametrize(
    ("config", "absent"), [(TIED, [EMBEDDING]), (UNTIED, [HEAD]), (UNTIED, [EMBEDDING]), (UNTIED, [EMBEDDING, HEAD])]
)
def test_what_neither_head_nor_embedding_can_stand_for_is_missing(tmp_path, config, absent):
    tensors = {name: value for name, value in weights(config).items() if name not in absent}
    tiny.write_checkpoint(tmp_path, config, tensors)
    with refused(*(f"missing tensor {name}" for name in absent), "download"):
        load(tmp_path)


# Names


def bare(tensors):
    return {name.removeprefix("model."): value for name, value in tensors.items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_names_without_their_prefix_are_read(tmp_path, config, shards):
    model = load(tiny.write_checkpoint(tmp_path / "bare", config, bare(weights(config)), shards))
    same_function(model, load(tiny.write_checkpoint(tmp_path / "full", config, weights(config))))


def test_names_of_both_kinds_are_read_where_they_name_one_tensor_each(tmp_path):
    full = weights()
    mixed = {name if "layers" in name else name.removeprefix("model."): value for name, value in full.items()}
    same_function(
        load(tiny.write_checkpoint(tmp_path / "mixed", TIED, mixed)), load(tiny.write_checkpoint(tmp_path / "full", TIED, full))
    )
    tiny.write_checkpoint(tmp_path / "both", TIED, full | {"norm.weight": full[NORM]})
    with refused("both", NORM, "norm.weight are there"):
        load(tmp_path / "both")


# Index and shards


def sharded(folder, change=lambda index: None, tensors=None):
    """Write two shards, then apply `change` to the index's map."""
    tiny.write_checkpoint(folder, TIED, tensors or weights(), shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_whole_file_wins_over_a_stale_index(tmp_path):
    sharded(tmp_path, tensors=tiny.weights(TIED, "stale"))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    tiny.write_checkpoint(tmp_path, TIED, weights())
    same_function(load(tmp_path), load(tiny.write_checkpoint(tmp_path / "alone", TIED, weights())))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_the_index_says_which_of_two_copies_is_meant(tmp_path):
    sharded(tmp_path)
    save_file(load_file(tmp_path / FIRST) | {NORM: np.zeros(48, np.float32)}, tmp_path / FIRST)
    with warned("left out", NORM):
        model = load(tmp_path)
    np.testing.assert_array_equal(model.params[NORM], weights()[NORM])


def test_what_the_index_leaves_out_is_no_part_of_the_model(tmp_path):
    sharded(tmp_path)
    save_file(load_file(tmp_path / FIRST) | {"model.layers.7.mlp.up_proj.weight": np.ones(3, np.float32)}, tmp_path / FIRST)
    with warned("left out", "model.layers.7.mlp.up_proj.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({NORM: FIRST}), (f"missing tensor {NORM}", f"in {SECOND}", f"looks for it in {FIRST}")),
        (lambda m: m.pop(NORM), (f"missing tensor {NORM}", f"in {SECOND}", "leaves it out")),
        (lambda m: m.update({"other": "gone.safetensors"}), ("'gone.safetensors'", "not in the folder")),
        (lambda m: m.update({"other": "a" * 5000 + ".safetensors"}), ("not in the folder",)),
        (lambda m: m.update({"other": "a\0b.safetensors"}), ("not in the folder",)),
        (lambda m: m.update({"other": None}), ("weight_map",)),
        (lambda m: m.clear(), ("weight_map",)),
    ],
)
def test_an_index_that_contradicts_its_shards_is_refused(tmp_path, change, words):
    with refused("index.json", *words):
        load(sharded(tmp_path, change))


def test_a_name_in_the_index_alone_is_no_matter(tmp_path):
    model = load(sharded(tmp_path, lambda m: m.update({"model.rotary_emb.inv_freq": FIRST})))
    np.testing.assert_array_equal(model.params[NORM], weights()[NORM])


# What is left out, and what is not

LAYER = "model.layers.0.self_attn"
IGNORED = [
    f"{LAYER}.k_scale",
    f"{LAYER}.v_scale",
    f"{LAYER}.attn.q_scale",
    f"{LAYER}.kv_scale",
    f"{LAYER}.k_proj.k_scale",
    f"{LAYER}.v_proj.output_scale",
    f"{LAYER}.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "model.embeddings.position_ids",
    f"{LAYER}.masked_bias",
    "score.weight",
    "classifier.bias",
    "v_head.summary.weight",
]
CHANGING = [
    f"{LAYER}.q_proj.bias",
    f"{LAYER}.q_norm.weight",
    f"{LAYER}.q_proj.weight_scale",
    f"{LAYER}.q_proj.input_scale",
    f"{LAYER}.q_proj.lora_A.weight",
    f"{LAYER}.k_proj.bias",
    "model.layers.0.mlp.up_proj.weight_scale_inv",
    "model.layers.0.mlp.up_proj.g_idx",
    "model.layers.0.post_feedforward_layernorm.weight",
    "model.layers.1.input_layernorm.weight",
    "lm_head.bias",
    "model.norm.bias",
]


def test_what_cannot_change_the_function_is_left_out_and_named(tmp_path):
    tiny.write_checkpoint(tmp_path / "more", TIED, weights() | {name: np.ones(3, np.float32) for name in IGNORED})
    with warned("left out", f"(and {len(IGNORED) - 3} more)"):
        model = load(tmp_path / "more")
    same_function(model, load(tiny.write_checkpoint(tmp_path / "plain", TIED, weights())))


@pytest.mark.parametrize("name", IGNORED)
def test_each_that_is_left_out_is_named(tmp_path, name):
    tiny.write_checkpoint(tmp_path, TIED, weights() | {name: np.ones(3, np.int8)})
    with warned("left out", name):
        load(tmp_path)


@pytest.mark.parametrize("name", CHANGING)
def test_what_would_change_the_function_is_refused(tmp_path, name):
    tiny.write_checkpoint(tmp_path, TIED, weights() | {name: np.ones(3, np.float32)})
    with refused(f"unknown tensor {name}"):
        load(tmp_path)


def test_a_name_that_would_break_the_line_or_steer_the_terminal_does_not(tmp_path):
    tiny.write_checkpoint(tmp_path, TIED, weights() | {"a\nb\x1b[2J" + "c" * 999: np.ones(3, np.float32)})
    with refused("unknown tensor a b?[2Jccc"):
        load(tmp_path)


def test_reported_folders_give_what_transformers_gives(shared):
    """Greedy tokens recorded with transformers."""
    forward = jax.jit(Network.__call__, static_argnums=0)
    folders = sorted(path.parent for path in (shared / "reports").glob("*/expect.json"))
    assert folders
    for folder in folders:
        expected = json.loads((folder / "expect.json").read_text())
        model, tokens = load(folder), [expected["prompt"] + expected["tokens"]]
        logits, *_ = forward(model.network, model.params, jnp.asarray(tokens), jnp.zeros(1, jnp.int32), None)
        chosen = np.argmax(logits[0], axis=-1)[len(expected["prompt"]) - 1 : -1]
        assert chosen.tolist() == expected["tokens"], folder.name
        assert describe(folder)["vocabulary"] == 96


def test_shapes_of_many_layers_are_told_by_one(tmp_path):
    """A config of a thousand layers is refused by the headers at once; building them would take minutes."""
    tiny.write_checkpoint(tmp_path, TIED, weights())
    (tmp_path / "config.json").write_text(json.dumps(TIED | {"num_hidden_layers": 1000}))
    with refused("missing tensor model.layers.1.", "more)"):
        load(tmp_path)
    shutil.rmtree(tmp_path)
