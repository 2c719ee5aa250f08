"""Layers, norms, activations and rotations, each alone, against their recorded outputs, their formulas and torch."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiling import quick_jit
from flax import nnx
from recorded import TOLERANCE, error, families, reference

from mlspecqd_jax.network.config import Layer, Norm, Rope
from mlspecqd_jax.network.layers import ACTIVATIONS, RMSNorm, Window
from mlspecqd_jax.network.ops import rotary
from mlspecqd_jax.network.rope import rope_of
from mlspecqd_jax.network.trunk import Block
from mlspecqd_jax.weights.tensors import EMBEDDING


def part(make, prefix: str, params: dict):
    """Build the module that `make(rngs)` makes around the parameters under a prefix; return (graph definition, state)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    paths = [path for path, _ in nnx.to_flat_state(state)]
    leaves = [(path, nnx.Param(params[".".join([prefix, *map(str, path)])])) for path in paths]
    return graphdef, nnx.from_flat_state(leaves)


def block(layer: Layer, norm: Norm, i: int, params: dict):
    k = params["model.norm.weight"].size
    return part(lambda rngs: Block(layer, norm, k, init=nnx.initializers.zeros, rngs=rngs), f"model.layers.{i}", params)


@functools.partial(quick_jit, static_argnums=(0, 1))
def apply_block(rope, graphdef, leaves, x):
    positions = jnp.arange(x.shape[1])[None, :]
    return nnx.merge(graphdef, leaves)(x, Window(positions, rotary(positions, rope)), None)[0]


def embedded(network, params):
    """What the first layer sees of the first row."""
    return network.config.embed_scale * np.asarray(params[EMBEDDING])[tiny.tokens()[:1]]


def test_families_differ_where_they_should(models):
    mixers = {family: models(family)[0].config.layers[1].mixer for family in tiny.FAMILIES}
    assert [family for family, mixer in mixers.items() if mixer.cap] == ["gemma2"]
    assert [family for family, mixer in mixers.items() if mixer.scale != mixer.head_dim**-0.5] == ["gemma2"]
    assert [family for family, mixer in mixers.items() if mixer.qk_norm] == ["qwen3", "qwen3_bias", "gemma3"]
    assert [layer.mixer.window for layer in models("gemma2")[0].config.layers] == [5, None, 5, None]
    assert [layer.mixer.window for layer in models("gemma3")[0].config.layers] == [6, 6, None, 6]


@families
def test_each_layer_alone(models, family):
    network, params = models(family)
    recorded = reference(family)
    x, norm = embedded(network, params), network.config.norm
    for i, layer in enumerate(network.config.layers):
        expected = recorded[f"layer_{i}"][None]
        assert error(apply_block(layer.mixer.rope, *block(layer, norm, i, params), x), expected) <= TOLERANCE
        x = expected


@pytest.mark.parametrize(
    ("family", "layer", "change"),
    [
        ("llama2", 1, {"rope": rope_of({"rope_type": "default", "rope_theta": 20000.0}, 10)}),
        ("llama2", 1, {"norm": Norm(2.0)}),
        ("llama3", 1, {"rope": rope_of({"rope_type": "default", "rope_theta": 10000.0}, 12)}),
        ("llama_linear", 1, {"rope": rope_of({"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}, 8)}),
        ("llama_bias", 1, {"act": "silu"}),
        ("mistral", 1, {"window": None}),
        ("mistral", 1, {"window": 8}),
        ("qwen2_window", 0, {"window": 5}),
        ("gemma2", 1, {"cap": None}),
        ("gemma2", 1, {"scale": 14**-0.5}),
        ("gemma2", 0, {"window": None}),
        ("gemma2", 1, {"norm": Norm(1e-5)}),
        ("gemma3", 1, {"cap": 4.0}),
        ("gemma3", 1, {"window": None}),
        ("gemma3", 2, {"rope": rope_of({"rope_type": "default", "rope_theta": 20000.0}, 10)}),
        ("gemma3", 1, {"rope": rope_of({"rope_type": "default", "rope_theta": 20000.0}, 10)}),
    ],
)
def test_a_wrong_layer_is_told_apart(models, family, layer, change):
    network, params = models(family)
    norm, right = change.pop("norm", network.config.norm), network.config.layers[layer]
    feed = dataclasses.replace(right.feed, act=change.pop("act", right.feed.act))
    wrong = Layer(dataclasses.replace(right.mixer, **change), feed, right.norms)
    recorded = reference(family) | {"layer_-1": embedded(network, params)[0]}
    x, expected = recorded[f"layer_{layer - 1}"][None], recorded[f"layer_{layer}"][None]
    assert error(apply_block(wrong.mixer.rope, *block(wrong, norm, layer, params), x), expected) > 1e-2


def test_llama3_frequencies(models):
    """High ones are kept, low ones divided by the factor, and between them lies what neither would be."""
    scaled = models("llama3")[0].config.layers[0].mixer.rope
    plain = rope_of({"rope_type": "default", "rope_theta": 10000.0}, 12)
    ratio = np.array(scaled.frequencies) / np.array(plain.frequencies)
    assert ratio[0] == 1
    assert 1 / 8 < ratio[1] < 1
    np.testing.assert_allclose(ratio[2:], 1 / 8, rtol=1e-12)


@families
@pytest.mark.torch
def test_live_parts_of_a_layer(models, family, tmp_path):
    torch = pytest.importorskip("torch")
    import record_reference_logits

    network, params = models(family)
    config = network.config
    norm, layer_1 = config.norm, config.layers[1]
    theirs = record_reference_logits.torch_model(tiny.write_family(tmp_path, family))
    x = 2 * np.random.RandomState(5).standard_normal((3, 11, config.hidden_size)).astype(np.float32)
    positions = jnp.tile(jnp.arange(11), (3, 1))
    layer, xt = theirs.model.layers[1], torch.tensor(x)
    with torch.no_grad():
        ours = nnx.merge(*block(layer_1, norm, 1, params))
        assert error(ours.mlp(x), layer.mlp(xt).numpy()) <= TOLERANCE
        assert error(ours.input_layernorm(x), layer.input_layernorm(xt).numpy()) <= TOLERANCE
        kind = (theirs.config.layer_types[1],) if family == "gemma3" else ()  # which has a rope for each kind of layer
        rotation = theirs.model.rotary_emb(xt, torch.arange(11)[None], *kind)
        cos, sin = rotary(positions, layer_1.mixer.rope)
        half = layer_1.mixer.head_dim // 2
        assert error(cos[:1], rotation[0].numpy()[..., :half]) <= 1e-5
        assert error(sin[:1], rotation[1].numpy()[..., :half]) <= 1e-5
        visible = np.tril(np.ones((11, 11), bool))
        window = layer_1.mixer.window
        if window is not None:
            visible &= ~np.tril(np.ones((11, 11), bool), -window)
        mask = torch.tensor(np.where(visible, 0, -np.inf)[None, None], dtype=torch.float32)
        expected = layer.self_attn(xt, position_embeddings=rotation, attention_mask=mask)[0].numpy()
        assert error(ours.self_attn(x, Window(positions, (cos, sin)), None)[0], expected) <= TOLERANCE


@pytest.mark.torch
def test_live_activations():
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    for name, activation in ACTIVATIONS.items():
        assert error(activation(x), ACT2FN[name](torch.tensor(x)).numpy()) <= 1e-6


def test_rms_norm_is_its_formula():
    norm = RMSNorm(5, Norm(0.5))
    x = np.array([[3.0, -4, 0, 1, 2]], np.float32)
    np.testing.assert_allclose(norm(x), x / np.sqrt(30 / 5 + 0.5), rtol=1e-6)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_an_offset_keeps_the_low_bits_of_its_weight():
    """1 + 2^-9 is 1 in bfloat16."""
    norm = RMSNorm(5, Norm(0.5, 1.0))
    norm.weight.set_value(jnp.full(5, 2.0**-9, jnp.bfloat16))
    x = np.array([[3.0, -4, 0, 1, 2]], np.float32)
    np.testing.assert_allclose(norm(x), (1 + 2.0**-9) * x / np.sqrt(30 / 5 + 0.5), rtol=1e-6)


def test_a_rope_s_magnitude_stretches_what_it_rotates():
    positions = jnp.array([[0, 3]])
    for found, plain in zip(rotary(positions, Rope((1.0, 0.1), 1.5)), rotary(positions, Rope((1.0, 0.1))), strict=True):
        np.testing.assert_allclose(found, 1.5 * plain, rtol=1e-6)
