"""The network against transformers' torch models: recorded logits and layers of every family, and live ones where torch is.

Errors are relative to the largest reference value: two f32 programs that add in another order differ by about 1e-6 of it, while a
wrong mask, angle or axis moves it by more than a hundredth (`test_a_wrong_layer_is_told_apart`).
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from mlspecqd_jax.loading import config_file
from mlspecqd_jax.network.attention import KVCache, attend, write
from mlspecqd_jax.network.layers import ACTIVATIONS, Block, RMSNorm
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.network.rope import RopeScaling, inverse_frequencies, rotary

TOLERANCE = 1e-4
B, T = tiny.TOKENS
S = T + 8  # cache positions, more than the tokens need

families = pytest.mark.parametrize("family", list(tiny.FAMILIES))


def error(ours, reference) -> float:
    ours, reference = np.asarray(ours, np.float32), np.asarray(reference, np.float32)
    assert ours.shape == reference.shape
    return float(np.max(np.abs(ours - reference)) / np.max(np.abs(reference)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from a family's name to (network, float32 parameters), whose names and shapes are those of its checkpoint."""

    @functools.cache
    def read(family):
        config = tiny.FAMILIES[family]
        network = Network(config_file.read_config(tiny.write_family(tmp_path_factory.mktemp(family), family)))
        assert network.shapes() == tiny.shapes(config)
        return network, {name: jnp.asarray(value) for name, value in tiny.weights(config, family).items()}

    return read


@functools.cache
def reference(family) -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(__file__).parents[1] / "reference" / f"{family}.npz") as recorded:
        return dict(recorded)


# Dozens of small programs are compiled here, each to run a few times: XLA's optimizations cost more than they save.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick_jit, static_argnums=0)
def apply(network, params, tokens, start, cache):
    return network(params, tokens, start, cache)[:2]


def whole(network, params, tokens=None):
    """One pass over all tokens that attends within its window."""
    tokens = tiny.tokens() if tokens is None else tokens
    return apply(network, params, tokens, np.zeros(len(tokens), np.int32), None)[0]


def stale_cache(network, params):
    """Caches full of what may be left behind by longer sequences: large, finite and random."""
    random = np.random.RandomState(3)
    empty = jax.eval_shape(lambda: network.init_cache(params, B, S))
    return jax.tree.map(lambda leaf: (1e4 * random.standard_normal(leaf.shape)).astype(leaf.dtype), empty)


def windows(network, params, cache, starts, width):
    """Feed windows of `width` tokens at the starts [rounds, B]; return the logits [B, T, V] last given at each position."""
    tokens = tiny.tokens()
    logits = np.full((B, T, network.vocab_size), np.nan, np.float32)
    for start in starts:
        at = start[:, None] + np.arange(width)[None, :]  # [B, width]
        window = np.take_along_axis(tokens, at, axis=1)
        out, cache = apply(network, params, window, start.astype(np.int32), cache)
        np.put_along_axis(logits, at[:, :, None], np.asarray(out), axis=1)
    return logits, cache


def single_steps(network, params, cache):
    return windows(network, params, cache, np.repeat(np.arange(T)[:, None], B, axis=1), 1)


@families
def test_logits_of_one_pass(models, family):
    assert error(whole(*models(family)), reference(family)["logits"]) <= TOLERANCE


@families
def test_logits_of_single_steps_over_a_stale_cache(models, family):
    network, params = models(family)
    logits, cache = single_steps(network, params, stale_cache(network, params))
    assert error(logits, reference(family)["logits"]) <= TOLERANCE
    clean, clean_cache = single_steps(network, params, network.init_cache(params, B, S))
    np.testing.assert_array_equal(logits, clean)
    for ours, zeros in zip(jax.tree.leaves(cache), jax.tree.leaves(clean_cache), strict=True):
        np.testing.assert_array_equal(ours[:, :, :T], zeros[:, :, :T])
        assert np.all(np.abs(zeros[:, :, T:]) == 0)  # nothing was written beyond the last token


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2_window", "qwen3_bias"])
def test_logits_of_ragged_windows(models, family):
    """Rows whose windows start at different positions, some of which feed a token once more, as verification does."""
    network, params = models(family)
    starts = np.array([[0, 0], [5, 3], [10, 4], [12, 9], [14, 13], [18, 18]])
    logits, _ = windows(network, params, stale_cache(network, params), starts, 5)
    assert error(logits, reference(family)["logits"]) <= TOLERANCE


@pytest.mark.parametrize("width", [2, 3, 5])
def test_a_window_is_its_single_steps(models, width):
    network, params = models("qwen2_window")
    starts = np.repeat(np.minimum(np.arange(0, T, width), T - width)[:, None], B, axis=1)
    logits, cache = windows(network, params, network.init_cache(params, B, S), starts, width)
    steps, steps_cache = single_steps(network, params, network.init_cache(params, B, S))
    assert error(logits, steps) <= 1e-5
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(steps_cache), strict=True):
        assert error(ours, theirs) <= 1e-5


def test_a_window_beyond_the_cache_writes_nothing_else(models):
    """The last window of a full buffer is wider than what is left: its surplus must be dropped, not moved or wrapped around."""
    network, params = models("llama3")
    tokens, start = tiny.tokens()[:, :5], np.array([S - 3, S - 5], np.int32)
    before = stale_cache(network, params)
    after = apply(network, params, tokens, start, before)[1]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        changed = np.any(np.asarray(old) != np.asarray(new), axis=(1, 3))  # [B, S]
        np.testing.assert_array_equal(changed, np.arange(S)[None, :] >= start[:, None])


def test_rows_do_not_see_each_other(models):
    network, params = models("mistral")
    tokens = tiny.tokens()
    other = tokens.copy()
    other[1] = (other[1] + 1) % network.vocab_size
    ours, theirs = whole(network, params), whole(network, params, other)
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert error(ours[1], theirs[1]) > 1e-2


def test_later_tokens_change_nothing(models):
    network, params = models("llama2")
    other = tiny.tokens()
    other[:, 9:] = (other[:, 9:] + 1) % network.vocab_size
    ours, theirs = whole(network, params), whole(network, params, other)
    np.testing.assert_array_equal(ours[:, :9], theirs[:, :9])
    assert error(ours[:, 9:], theirs[:, 9:]) > 1e-2


def part(make, prefix: str, params: dict):
    """Build the module that `make(rngs)` makes around the parameters under a prefix; return (graph definition, state)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    paths = [path for path, _ in nnx.to_flat_state(state)]
    leaves = [(path, nnx.Param(params[".".join([prefix, *map(str, path)])])) for path in paths]
    return graphdef, nnx.from_flat_state(leaves)


def block(config, i, params):
    return part(lambda rngs: Block(config, i, init=nnx.initializers.zeros, rngs=rngs), f"model.layers.{i}", params)


def frequencies(config):
    return inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


@functools.partial(quick_jit, static_argnums=(0, 1))
def apply_block(config, graphdef, leaves, x):
    positions = jnp.arange(x.shape[1])[None, :]
    return nnx.merge(graphdef, leaves)(x, positions, rotary(positions, frequencies(config)), None)[0]


@families
def test_each_layer_alone(models, family):
    network, params = models(family)
    recorded = reference(family)
    x = np.asarray(params["model.embed_tokens.weight"])[tiny.tokens()[:1]]
    for i in range(network.config.num_hidden_layers):
        expected = recorded[f"layer_{i}"][None]
        assert error(apply_block(network.config, *block(network.config, i, params), x), expected) <= TOLERANCE
        x = expected


@pytest.mark.parametrize(
    ("family", "layer", "change"),
    [
        ("llama2", 1, {"rope_theta": 20000.0}),
        ("llama2", 1, {"rms_norm_eps": 2.0}),
        ("llama3", 1, {"rope_scaling": RopeScaling()}),
        ("llama_linear", 1, {"rope_scaling": RopeScaling("linear", factor=2.0)}),
        ("llama_bias", 1, {"hidden_act": "silu"}),
        ("mistral", 1, {"sliding_windows": ()}),
        ("mistral", 1, {"sliding_windows": (8, 8)}),
        ("qwen2_window", 0, {"sliding_windows": (5, 5, 5)}),
    ],
)
def test_a_wrong_layer_is_told_apart(models, family, layer, change):
    network, params = models(family)
    wrong = dataclasses.replace(network.config, **change)
    recorded = reference(family) | {"layer_-1": np.asarray(params["model.embed_tokens.weight"])[tiny.tokens()[0]]}
    x, expected = recorded[f"layer_{layer - 1}"][None], recorded[f"layer_{layer}"][None]
    assert error(apply_block(wrong, *block(wrong, layer, params), x), expected) > 1e-2


@pytest.mark.parametrize("name", ["q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias", "q_norm.weight", "k_norm.weight"])
def test_every_optional_tensor_is_used(models, name):
    network, params = models("qwen3_bias")
    name = f"model.layers.1.self_attn.{name}"
    changed = params | {name: jnp.zeros_like(params[name])}
    assert error(whole(network, changed), reference("qwen3_bias")["logits"]) > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_stay_close(models, dtype):
    network, params = models("mistral")
    narrow = {name: np.asarray(leaf).astype(dtype) for name, leaf in params.items()}
    logits = whole(network, narrow)
    assert logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits))
    # Rounding of the weights alone moves a logit by about 2^-9 (bfloat16) of the terms that it sums, layer by layer.
    assert error(logits, reference("mistral")["logits"]) <= {"bfloat16": 0.1, "float16": 0.02}[dtype]
    cache = network.init_cache(narrow, B, S)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache)} == {dtype}


def test_extreme_scores_stay_finite():
    """Scores of a bfloat16 model may reach thousands; softmax in f32 with the maximum taken out must not overflow."""
    q = np.full((1, 2, 3, 4), 200.0, jnp.bfloat16)
    k = np.array([200.0, 200.0, -200.0], jnp.bfloat16)[None, None, :, None].repeat(4, axis=3)
    v = np.arange(12).astype(jnp.bfloat16).reshape(1, 1, 3, 4)
    first, last = np.zeros((1, 3), np.int32), np.arange(3, dtype=np.int32)[None]
    out = quick_jit(attend)(q, k, v, first, last).astype(jnp.float32)
    expected = np.array([[0, 1, 2, 3], [2, 3, 4, 5], [2, 3, 4, 5]])
    np.testing.assert_allclose(out, np.concatenate([expected, expected], axis=1)[None])


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_attention_is_its_formula(monkeypatch, platform):
    """The CPU contracts in a layout of its own; what accelerators run must be the same function."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, **forms: forms[platform](*arguments))
    random = np.random.RandomState(2)
    q, k, v = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 6, 4, 10), (2, 3, 9, 10), (2, 3, 9, 10)))
    last = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
    first = np.maximum(last - 5, 0)
    expected = np.zeros((2, 4, 6, 10))
    for row, window, head in np.ndindex(2, 4, 6):
        seen = slice(first[row, window], last[row, window] + 1)
        weights = np.exp(k[row, head // 2, seen] @ q[row, head, window] / np.sqrt(10))
        expected[row, window, head] = weights / weights.sum() @ v[row, head // 2, seen]
    ours = quick_jit(lambda *arguments: attend(*arguments))(q, k, v, first, last)
    assert error(ours, expected.reshape(2, 4, 60)) <= 1e-5


def test_a_masked_nan_is_harmless(models):
    """A token whose keys overflow must not poison those that never see it (0 * NaN is NaN)."""
    network, params = models("llama_linear")
    cache = network.init_cache(params, B, S)
    broken = params | {"model.embed_tokens.weight": params["model.embed_tokens.weight"].at[5].set(jnp.nan)}
    _, cache = apply(network, broken, np.full((B, 1), 5, np.int32), np.array([20, 20], np.int32), cache)
    assert np.all([np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(cache)])


def test_init_gives_every_parameter(models):
    for family in ("llama3", "qwen3_bias"):
        network, params = models(family)
        made = jax.eval_shape(functools.partial(network.init, 3, jnp.bfloat16))
        assert {name: leaf.shape for name, leaf in made.items()} == {name: leaf.shape for name, leaf in params.items()}
        assert {leaf.dtype.name for leaf in made.values()} == {"bfloat16"}
    small = dataclasses.replace(models("llama_bias")[0].config, num_hidden_layers=1)
    made = quick_jit(lambda: Network(small).init(3, stddev=0.5))()
    assert 0.45 < np.std(made["lm_head.weight"]) < 0.55
    assert np.all(made["model.norm.weight"] == 1)
    assert np.all(made["model.layers.0.mlp.up_proj.bias"] == 0)
    assert error(made["model.layers.0.mlp.up_proj.weight"], made["model.layers.0.mlp.gate_proj.weight"]) > 0.1


def test_llama3_frequencies(models):
    """High ones are kept, low ones divided by the factor, and between them lies what neither would be."""
    scaled = models("llama3")[0].config
    plain = dataclasses.replace(scaled, rope_scaling=RopeScaling())
    ratio = np.array(frequencies(scaled)) / np.array(frequencies(plain))
    assert ratio[0] == 1
    assert 1 / 8 < ratio[1] < 1
    np.testing.assert_allclose(ratio[2:], 1 / 8, rtol=1e-12)


@families
@pytest.mark.torch
def test_live_logits_and_layers(models, family, tmp_path):
    pytest.importorskip("torch")
    import record_reference_logits

    folder = tiny.write_family(tmp_path, family)
    network, params = models(family)
    # Other tokens than the recorded ones, and a length at which `apply` compiles anew.
    tokens = np.random.RandomState(11).randint(0, network.vocab_size, (3, 37)).astype(np.int32)
    found = record_reference_logits.record(folder, tokens)
    assert error(whole(network, params, tokens), found["logits"]) <= TOLERANCE
    recorded = record_reference_logits.record(folder, tiny.tokens())
    for key, value in reference(family).items():
        now = recorded[key] if key == "logits" else recorded[key][0]
        assert error(now, value) <= TOLERANCE


@families
@pytest.mark.torch
def test_live_parts_of_a_layer(models, family, tmp_path):
    torch = pytest.importorskip("torch")
    import record_reference_logits

    network, params = models(family)
    config = network.config
    theirs = record_reference_logits.torch_model(tiny.write_family(tmp_path, family))
    x = 2 * np.random.RandomState(5).standard_normal((3, 11, config.hidden_size)).astype(np.float32)
    positions = jnp.tile(jnp.arange(11), (3, 1))
    layer, xt = theirs.model.layers[1], torch.tensor(x)
    with torch.no_grad():
        ours = nnx.merge(*block(config, 1, params))
        assert error(ours.mlp(x), layer.mlp(xt).numpy()) <= TOLERANCE
        assert error(ours.input_layernorm(x), layer.input_layernorm(xt).numpy()) <= TOLERANCE
        rotation = theirs.model.rotary_emb(xt, torch.arange(11)[None])
        cos, sin = rotary(positions, frequencies(config))
        half = config.head_dim // 2
        assert error(cos[:1], rotation[0].numpy()[..., :half]) <= 1e-5
        assert error(sin[:1], rotation[1].numpy()[..., :half]) <= 1e-5
        visible = np.tril(np.ones((11, 11), bool))
        window = config.sliding_windows[1] if config.sliding_windows else None
        if window is not None:
            visible &= ~np.tril(np.ones((11, 11), bool), -window)
        mask = torch.tensor(np.where(visible, 0, -np.inf)[None, None], dtype=torch.float32)
        expected = layer.self_attn(xt, position_embeddings=rotation, attention_mask=mask)[0].numpy()
        assert error(ours.self_attn(x, positions, (cos, sin), None)[0], expected) <= TOLERANCE


@pytest.mark.torch
def test_live_activations():
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    for name, activation in ACTIVATIONS.items():
        assert error(activation(x), ACT2FN[name](torch.tensor(x)).numpy()) <= 1e-6


def test_rms_norm_is_its_formula():
    norm = RMSNorm(5, 0.5)
    x = np.array([[3.0, -4, 0, 1, 2]], np.float32)
    np.testing.assert_allclose(norm(x), x / np.sqrt(30 / 5 + 0.5), rtol=1e-6)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_write_puts_each_row_at_its_own_positions():
    cache = KVCache(jnp.zeros((2, 1, 6, 1)), jnp.zeros((2, 1, 6, 1)))
    values = jnp.arange(1.0, 5).reshape(2, 1, 2, 1)
    k, v = write(cache, values, 10 * values, jnp.array([1, 4]))
    np.testing.assert_array_equal(k[:, 0, :, 0], [[0, 1, 2, 0, 0, 0], [0, 0, 0, 0, 3, 4]])
    np.testing.assert_array_equal(v, 10 * k)
