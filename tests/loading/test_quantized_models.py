"""Folders of quantized weights: decoded, as the twin of the model that they were made from, or as a draft of their own."""

import jax
import numpy as np
import pytest
import quantized_folders as made
import tiny
from refusals import refused

import mlspecqd_jax as mlsd
from mlspecqd_jax.stacks import is_twin
from mlspecqd_jax.weights.quantized_array import QuantizedArray

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PLAIN = made.weights()
TOKENS = tiny.tokens()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return mlsd.load(made.write_plain(tmp_path_factory.mktemp("plain") / "model", PLAIN), dtype="float32")


def write(folder, layout, plain=PLAIN, **changes):
    tensors, stands_for = made.quantized(layout, plain)
    return made.write(folder / "quantized", tensors | changes, made.LAYOUTS[layout][0]), stands_for


def logits(model, params=None):
    run = jax.jit(model.network.__call__, static_argnums=3)
    return np.asarray(run(params or model.params, TOKENS, np.zeros(len(TOKENS), np.int32), None)[0])


def quantized_leaves(model):
    return [leaf for leaf in model.params.values() if isinstance(leaf, QuantizedArray)]


QUICK = ("gptq act-order", "nvfp4")


@pytest.mark.parametrize("layout", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in made.LAYOUTS])
def test_logits_are_those_of_the_weights_that_a_folder_stands_for(tmp_path, capsys, target, layout):
    folder, stands_for = write(tmp_path, layout)
    params = {name: np.asarray(w, np.float32) for name, w in stands_for.items()}
    expected = logits(target, params)
    twin = mlsd.load(folder, twin_of=target)
    assert is_twin(twin, target)
    assert capsys.readouterr().err.endswith(f"as the twin of {target.card.name}, whose embedding and cache they share\n")
    assert all(twin.params[name] is target.params[name] for name in PLAIN if not made.is_linear(name))
    # Zeros times scales are rounded to float16.
    atol = (4e-3 if any("minima" in leaf.arrays for leaf in quantized_leaves(twin)) else 1e-5) * np.abs(expected).max()
    np.testing.assert_allclose(logits(twin), expected, rtol=0, atol=atol)
    decoded = mlsd.load(folder, dequantize=True, dtype="float32")
    np.testing.assert_allclose(logits(decoded), expected, rtol=0, atol=atol)
    assert decoded.recipe is None


@pytest.mark.slow
def test_a_twin_drafts_and_changes_no_token(tmp_path, target):
    folder, _ = write(tmp_path, "gptq")
    twin = mlsd.load(folder, twin_of=target)
    stack = mlsd.stack(target, (twin, 4), exact=False)
    assert stack.level.drafter.share_cache
    alone = mlsd.generate(mlsd.stack(target, exact=False), ["ab cd", "x"], max_new_tokens=12)
    assert mlsd.generate(stack, ["ab cd", "x"], max_new_tokens=12).tokens == alone.tokens
    with refused("quantized already", "original model"):
        twin.quantized()
    with refused("twin_of is", "quantized itself"):
        mlsd.load(folder, twin_of=twin)


@pytest.mark.parametrize("layout", ["gptq", "fp8 tiles"])
def test_another_models_weights_are_refused(tmp_path, target, layout):
    folder, _ = write(tmp_path, layout, made.weights("another"))
    with refused("q_proj.weight times its norm is off", "another model"):
        mlsd.load(folder, twin_of=target)


def test_rows_in_another_order_are_refused(tmp_path, target):
    name = "model.layers.1.self_attn.v_proj.weight"
    shuffled = np.random.default_rng(0).permutation(PLAIN[name])
    folder, _ = write(tmp_path, "awq", PLAIN | {name: shuffled})
    with refused(name, "in an order that is not known"):
        mlsd.load(folder, twin_of=target)


def test_zeros_of_the_other_version_are_refused(tmp_path, target):
    tensors, _ = made.quantized("gptq v2 with zeros", PLAIN)
    folder = made.write(tmp_path / "q", tensors, made.LAYOUTS["gptq v2 with zeros"][0] | {"checkpoint_format": "gptq"})
    with refused("times its norm is off", "zeros are stored in another way"):
        mlsd.load(folder, twin_of=target)


def test_an_inverted_scale_is_refused(tmp_path, target):
    tensors, _ = made.quantized("nvfp4", PLAIN)
    tensors |= {name: 1 / array for name, array in tensors.items() if name.endswith("global_scale")}
    folder = made.write(tmp_path / "q", tensors, made.LAYOUTS["nvfp4"][0])
    with refused("times its norm is off", "its scales are read wrongly"):
        mlsd.load(folder, twin_of=target)


def smoothed(plain, values_too=False):
    """Move factors from norms to what reads them, and from rows of values to columns of the output."""
    random, moved = np.random.default_rng(3), dict(plain)
    for i in range(made.CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        factors = random.uniform(0.5, 2, 64).astype(np.float32)
        moved[f"{layer}.input_layernorm.weight"] = plain[f"{layer}.input_layernorm.weight"] / factors
        for kind in ("q_proj", "k_proj", "v_proj"):
            moved[f"{layer}.self_attn.{kind}.weight"] = plain[f"{layer}.self_attn.{kind}.weight"] * factors
        if values_too:
            moved[f"{layer}.self_attn.v_proj.weight"] *= np.linspace(0.85, 1.15, 32, dtype=np.float32)[:, None]
    return moved


def test_moved_factors_leave_a_twin_with_norms_of_its_own(tmp_path, target):
    folder, _ = write(tmp_path, "awq", smoothed(PLAIN))
    twin = mlsd.load(folder, twin_of=target)
    assert is_twin(twin, target)
    assert twin.params["model.layers.0.input_layernorm.weight"] is not target.params["model.layers.0.input_layernorm.weight"]
    assert twin.params["model.norm.weight"] is target.params["model.norm.weight"]


def test_scaled_values_need_a_cache_of_their_own(tmp_path, capsys, target):
    folder, _ = write(tmp_path, "awq", smoothed(PLAIN, values_too=True))
    draft = mlsd.load(folder, twin_of=target)
    assert not is_twin(draft, target)
    line = capsys.readouterr().err
    assert "with a cache of their own" in line
    assert "v_proj.weight is 0.8" in line or "v_proj.weight is 1.1" in line
    assert not mlsd.stack(target, (draft, 4), exact=False).level.drafter.share_cache
    assert draft.params["lm_head.weight"] is target.params["lm_head.weight"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("model.embed_tokens.weight", "its embedding is another"), ("model.norm.weight", None), ("lm_head.weight", None)],
)
def test_other_plain_weights(tmp_path, capsys, target, name, words):
    folder, _ = write(tmp_path, "int8", **{name: (PLAIN[name] * 1.1).astype(np.float16)})
    draft = mlsd.load(folder, twin_of=target)
    assert is_twin(draft, target) == (words is None)
    assert draft.params[name] is not target.params[name]
    assert words is None or words in capsys.readouterr().err


def test_another_network_drafts_with_a_cache_of_its_own(tmp_path, capsys, target):
    config = made.CONFIG | {"num_hidden_layers": 1}
    tensors, _ = made.quantized("mxfp4", made.weights("small", config))
    folder = made.write(tmp_path / "small", tensors, made.LAYOUTS["mxfp4"][0], config)
    draft = mlsd.load(folder, twin_of=target)
    assert not is_twin(draft, target)
    assert "its network is another" in capsys.readouterr().err
    assert not mlsd.stack(target, (draft, 3), exact=False).level.drafter.share_cache


def test_what_load_is_asked_for(tmp_path, target):
    folder, _ = write(tmp_path, "gptq")
    with refused("quantized already ('gptq')", "BF16", "twin_of=target, --draft FOLDER", "dequantize=True, --dequantize"):
        mlsd.load(folder)
    with refused("twin_of drafts with weights as they are stored", "give one of the two"):
        mlsd.load(folder, twin_of=target, dequantize=True)
    with refused("twin_of is 'demo'", "a Model"):
        mlsd.load(folder, twin_of="demo")
    with refused("dequantize is 1, but must be True or False"):
        mlsd.load(folder, dequantize=1)
    with refused("config.json", "quantized already", "'gptq'"):
        mlsd.load(made.write(tmp_path / "text", {}, "gptq"))
    with refused("says nothing of quantized weights"):
        mlsd.load(target.folder, dequantize=True)
    with refused("says nothing of quantized weights"):
        mlsd.load(target.folder, twin_of=target)
