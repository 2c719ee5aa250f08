"""GGUF files as drafts: packed as they are stored, the twin of the model that they were made from, or a draft of their own."""

import functools
import json

import folders
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized_folders as made
import tiny
from gguf_encoders import ENCODERS, encode
from refusals import refused

import mlspecqd_jax as mlsd
from mlspecqd_jax import specs
from mlspecqd_jax.loading import models
from mlspecqd_jax.loading.gguf.blocks import BLOCKS
from mlspecqd_jax.stacks import is_twin
from mlspecqd_jax.weights.cast import dequantize
from mlspecqd_jax.weights.quantized_array import QuantizedArray

# Inputs in whole blocks of 256, two of them for one weight.
CONFIG = made.CONFIG | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
del CONFIG["rope_scaling"]
PLAIN = tiny.weights(CONFIG)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINEAR = [name for name in PLAIN if name.endswith("_proj.weight") or name == HEAD]
FORMATS = {block.name: block.format for block in BLOCKS.values()}
TOKENS = tiny.tokens()
pytestmark = [pytest.mark.usefixtures("compiled_quickly"), pytest.mark.filterwarnings("ignore:.*weights are dequantized")]


def token_list(start=()):
    """The tokens of `folders.tokenizer`, in the order of their ids and filled up to the vocabulary, as keys."""
    vocabulary = folders.tokenizer().get_vocab()
    tokens = [*start, *sorted(vocabulary, key=vocabulary.get)][: CONFIG["vocab_size"]]
    types = [3 if token in folders.SPECIAL else 2 if token == "<unk>" else 1 for token in tokens]
    more = CONFIG["vocab_size"] - len(tokens)
    return [*tokens, *(f"[PAD{i}]" for i in range(more))], [*types, *[5] * more]


def tensors_of(kind, plain=PLAIN, config=CONFIG):
    return {key: encode(tensor, kind) for key, tensor in gguf_files.tensors_of(config, plain).items()}


def write(folder, kind="Q8_0", plain=PLAIN, config=CONFIG, name="x.gguf", start=(), **changes):
    """Write a file whose matrices are of one type, but for those in `changes`, whose splitting of text is nobody's."""
    keys = gguf_files.tokenizer_keys("gpt2", *token_list(start), pre="nobody's", eos_token_id=2)
    return gguf_files.write(folder / name, gguf_files.keys_of(config) | keys, tensors_of(kind, plain, config) | changes)


def write_other_keys(folder, kind="Q8_0", **keys):
    """Write a file with these keys for a tokenizer, or without one."""
    return gguf_files.write(folder / "plain.gguf", gguf_files.keys_of(CONFIG) | keys, tensors_of(kind))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return mlsd.load(made.write_plain(tmp_path_factory.mktemp("plain") / "model", PLAIN, CONFIG), dtype="float32")


@functools.cache
def values_of(folder, kind):
    """What a file's tensors are decoded to as a target's, float32 by name."""
    file = write_other_keys(folder, kind)
    return {name: np.asarray(leaf) for name, leaf in mlsd.load(file, dtype="float32").params.items()}


def logits(model, params=None):
    run = jax.jit(model.network.__call__, static_argnums=3)
    return np.asarray(run(params or model.params, TOKENS, np.zeros(len(TOKENS), np.int32), None)[0])


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_twin_keeps_every_type_packed(tmp_path, capsys, target, kind):
    twin, values = mlsd.load(write(tmp_path, kind), twin_of=target), values_of(tmp_path, kind)
    assert is_twin(twin, target)
    said = f"x.gguf: weights of GGUF ({FORMATS[kind]}) as the twin of {target.card.name}, whose embedding and cache they share\n"
    assert capsys.readouterr().err.endswith(said)
    for name, leaf in twin.params.items():
        if name not in LINEAR:
            assert leaf is target.params[name]
            continue
        assert leaf.format == FORMATS[kind]
        found = np.asarray(dequantize(leaf, jnp.dtype(jnp.float32)))
        # Scales and minima of K-quants are products, which float16 rounds.
        largest = np.abs(values[name]).max() if kind.endswith("_K") else 0
        np.testing.assert_allclose(found, values[name], rtol=0, atol=2.0**-10 * largest, err_msg=name)
        assert np.abs(found - PLAIN[name]).max() < np.abs(PLAIN[name]).max() / 4


@pytest.mark.slow
def test_logits_are_those_of_the_values(tmp_path, target):
    twin = mlsd.load(write(tmp_path, "Q5_0"), twin_of=target)
    values = values_of(tmp_path, "Q5_0")
    expected = logits(target, target.params | {name: values[name] for name in LINEAR})
    np.testing.assert_allclose(logits(twin), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_a_twin_drafts_and_changes_no_token(tmp_path, target):
    twin = mlsd.load(write(tmp_path), twin_of=target)
    stack = mlsd.stack(target, (twin, 4), exact=False)
    assert stack.level.drafter.share_cache
    found = mlsd.generate(stack, ["ab cd", "x"], max_new_tokens=12)
    assert found.tokens == mlsd.generate(mlsd.stack(target, exact=False), ["ab cd", "x"], max_new_tokens=12).tokens
    assert found.report["levels"][0]["accepted"] > 0
    with refused("quantized already", "original model"):
        twin.quantized()


def test_a_file_drafts_for_itself(tmp_path):
    file = write_other_keys(tmp_path, "Q4_K")
    model = mlsd.load(file)
    twin = mlsd.load(file, twin_of=model)
    assert is_twin(twin, model)
    assert twin.nbytes < 0.6 * model.nbytes
    assert mlsd.load(file, dequantize=True).params.keys() == model.params.keys()


def test_a_packed_embedding_is_a_tied_head(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    plain = tiny.weights(config)
    target = mlsd.load(made.write_plain(tmp_path / "model", plain, config), dtype="float32")
    twin = mlsd.load(write(tmp_path, "Q6_K", plain, config), twin_of=target)
    assert is_twin(twin, target)
    assert twin.params[HEAD].format == "int8_g16"
    np.testing.assert_allclose(dequantize(twin.params[HEAD], jnp.dtype(jnp.float32)), plain[EMBEDDING], atol=0.05)
    floats = {"token_embd.weight": gguf_files.floats(plain[EMBEDDING].astype(np.float16), "F16")}
    twin = mlsd.load(write(tmp_path, "Q6_K", plain, config, **floats), twin_of=target)
    assert is_twin(twin, target)
    assert HEAD not in twin.params


def changed(**changes):
    return PLAIN | {f"model.layers.1.self_attn.{name}.weight": array for name, array in changes.items()}


V, Q = (PLAIN[f"model.layers.1.self_attn.{kind}_proj.weight"] for kind in "vq")


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (tiny.weights(CONFIG, "another"), ["q_proj.weight times its norm is off", "another model"]),
        (changed(v_proj=np.random.default_rng(0).permutation(V)), ["1.self_attn.v_proj.weight", "in an order that is not known"]),
        (changed(q_proj=Q.reshape(4, 2, 32, 256).swapaxes(1, 2).reshape(256, 256)), ["1.self_attn.q_proj.weight", "an order"]),
        (changed(v_proj=20 * V), ["v_proj.weight", "its scales are read wrongly"]),
    ],
    ids=["foreign", "shuffled", "permuted heads", "scaled"],
)
def test_another_models_weights_are_refused(tmp_path, target, plain, words):
    with refused(*words):
        mlsd.load(write(tmp_path, plain=plain), twin_of=target)


def test_what_is_not_the_models_needs_a_cache_of_its_own(tmp_path, capsys, target):
    other = np.random.default_rng(0).permutation(PLAIN[EMBEDDING])
    draft = mlsd.load(write(tmp_path, plain=PLAIN | {EMBEDDING: other}), twin_of=target)
    assert not is_twin(draft, target)
    assert "with a cache of their own" in (line := capsys.readouterr().err)
    assert "its embedding is another" in line
    np.testing.assert_allclose(draft.embedding, other, atol=0.02)
    rows = changed(v_proj=V * np.linspace(0.8, 1.2, len(V), dtype=np.float32)[:, None])
    draft = mlsd.load(write(tmp_path, "Q4_K", rows, name="y.gguf"), twin_of=target)
    assert not is_twin(draft, target)
    assert "v_proj.weight is 0.8" in (line := capsys.readouterr().err) or "v_proj.weight is 1.2" in line


@pytest.mark.parametrize("config", [CONFIG | {"num_hidden_layers": 1}, tiny.FAMILIES["qwen2"] | {"hidden_size": 96}])
def test_another_network_drafts_with_a_cache_of_its_own(tmp_path, capsys, target, config):
    plain = tiny.weights(config)
    layers = {name: plain[name] for name in plain if name.endswith("down_proj.weight")}  # of 51 inputs, which are no blocks
    narrow = {gguf_files.gguf_name(name, config): gguf_files.floats(w, "F16") for name, w in layers.items()}
    file = write(tmp_path, plain=plain | {name: np.zeros((32, 32)) for name in layers}, config=config, **narrow)
    draft = mlsd.load(file, twin_of=target)
    assert not is_twin(draft, target)
    assert "its network is another" in capsys.readouterr().err
    assert draft.network.config.tied == (HEAD not in draft.params)
    assert {type(draft.params[name]) for name in plain if "_proj.weight" in name} == {QuantizedArray, type(target.embedding)}
    assert not mlsd.stack(target, (draft, 3), exact=False).level.drafter.share_cache


def test_tokens_are_compared_and_no_tokenizer_is_made(tmp_path, target):
    twin = mlsd.load(write(tmp_path), twin_of=target)
    assert twin.tokenizer is target.tokenizer
    with refused("nobody's", "use the original checkpoint"):  # of other tokens one would be made
        mlsd.load(write(tmp_path, start=["another"]), twin_of=target)
    keys = gguf_files.tokenizer_keys("gpt2", *token_list(["another"]), pre="default", merges=[])
    draft = mlsd.load(write_other_keys(tmp_path, **keys), twin_of=target)
    with refused("the tokenizers of", "differ: token 0 is 'another'", "draft with a model of the target's tokenizer"):
        mlsd.stack(target, draft)


def test_scales_that_are_no_numbers_are_refused(tmp_path, target):
    kind, raw, shape = tensors_of("Q8_0")["blk.0.ffn_up.weight"]
    raw[:2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    with refused("x.gguf: tensor blk.0.ffn_up.weight holds NaN or infinity"):
        mlsd.load(write(tmp_path, **{"blk.0.ffn_up.weight": (kind, raw, shape)}), twin_of=target)


@pytest.mark.slow
def test_on_the_command_line(tmp_path, target):
    packed, floats = write(tmp_path), gguf_files.model(tmp_path / "floats.gguf", CONFIG, kind="F16")
    assert models.is_quantized(packed)
    assert not models.is_quantized(floats)
    asked = []

    def load(name, twin_of=None):
        asked.append((name, twin_of))
        return mlsd.load(name, dtype="float32") if twin_of is None else mlsd.load(name, twin_of=twin_of)

    found = specs.drafters(specs.parse([f"{packed}:4", f"{floats}:2"]), target, load)
    assert [draft_len for _, draft_len in found] == [4, 2]
    assert asked == [(str(packed), target), (str(floats), None)]
    with refused("says nothing of quantized weights"):
        mlsd.load(floats, twin_of=target)
    plain = write_other_keys(tmp_path)
    ((cast, _),) = specs.drafters(specs.parse([f"{plain}@int4:3"]), target, load)  # dequantized, then cast
    assert {leaf.format for leaf in cast.params.values() if isinstance(leaf, QuantizedArray)} == {"int4"}


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
def test_three_levels_change_no_token(tmp_path, target, layers):
    config = CONFIG | {"num_hidden_layers": layers}
    draft = mlsd.load(write(tmp_path, "Q6_K", tiny.weights(config), config), twin_of=target)
    assert is_twin(draft, target) == (layers == CONFIG["num_hidden_layers"])
    stack = mlsd.stack(target, (draft, 4), (mlsd.prompt_lookup(), 3), exact=False)
    alone = mlsd.generate(mlsd.stack(target, exact=False), ["ab cd", "x"], max_new_tokens=12)
    assert mlsd.generate(stack, ["ab cd", "x"], max_new_tokens=12).tokens == alone.tokens


@pytest.mark.slow
def test_eight_bits_of_a_model_are_nearly_always_accepted(tmp_path):
    target, prompts = mlsd.load("demo"), ["def mean(values):\n", "The meaning of "]
    config = json.loads((target.folder / "config.json").read_text())
    plain = {name: np.asarray(leaf, np.float32) for name, leaf in target.params.items()}
    file = gguf_files.write(tmp_path / "x.gguf", gguf_files.keys_of(config), tensors_of("Q8_0", plain, config))
    twin = mlsd.load(file, twin_of=target)
    assert is_twin(twin, target)
    found = mlsd.generate(mlsd.stack(target, (twin, 5)), prompts, max_new_tokens=64)
    assert found.tokens == mlsd.generate(mlsd.stack(target), prompts, max_new_tokens=64).tokens
    assert found.report["levels"][0]["token_acceptance"] > 0.95
