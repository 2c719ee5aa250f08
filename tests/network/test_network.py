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
from mlspecqd_jax.network.attention import KVCache
from mlspecqd_jax.network.config import Layer, Norm, Rope
from mlspecqd_jax.network.layers import ACTIVATIONS, Block, RMSNorm
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.network.ops import attend, rotary, write
from mlspecqd_jax.network.rope import rope_of
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD, Source

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
        assert {name: tensor.shape for name, tensor in network.tensors().items()} == tiny.shapes(config)
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


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2_window", "qwen3_bias", "gemma2", "gemma3"])
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


def block(layer: Layer, norm: Norm, i: int, params: dict):
    k = params["model.norm.weight"].size
    return part(lambda rngs: Block(layer, norm, k, init=nnx.initializers.zeros, rngs=rngs), f"model.layers.{i}", params)


@functools.partial(quick_jit, static_argnums=(0, 1))
def apply_block(rope, graphdef, leaves, x):
    positions = jnp.arange(x.shape[1])[None, :]
    return nnx.merge(graphdef, leaves)(x, positions, rotary(positions, rope), None)[0]


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


@pytest.mark.parametrize("change", [{"embed_scale": 1.0}, {"logit_cap": None}])
def test_a_wrong_scalar_is_told_apart(models, change):
    network, params = models("gemma2")
    wrong = Network(dataclasses.replace(network.config, **change))
    assert error(whole(wrong, params), reference("gemma2")["logits"]) > 1e-2


@pytest.mark.parametrize("name", ["mlp.up_proj", "post_feedforward_layernorm", "pre_feedforward_layernorm", "self_attn.k_norm"])
def test_every_tensor_of_gemma_is_used(models, name):
    network, params = models("gemma3")
    name = f"model.layers.1.{name}.weight"
    changed = params | {name: params[name] + 0.5}
    assert error(whole(network, changed), reference("gemma3")["logits"]) > 1e-2


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


@pytest.mark.parametrize(
    ("scale", "cap", "sinks", "size"),
    [
        (None, None, False, 10),
        (0.7, None, False, 10),
        (None, 0.8, False, 10),
        (None, None, True, 10),
        (None, None, False, 7),
        (0.7, 0.8, True, 7),
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_attention_is_its_formula(monkeypatch, platform, scale, cap, sinks, size):
    """The CPU contracts in a layout of its own; what accelerators run must be the same function."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, **forms: forms[platform](*arguments))
    random, slots = np.random.RandomState(2), 300 if cap else 9  # of more than one block
    q, k, v = (random.standard_normal(n).astype(np.float32) for n in ((2, 6, 4, 10), (2, 3, slots, 10), (2, 3, slots, size)))
    sinks = random.standard_normal(6).astype(np.float32) if sinks else None
    last = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32) + slots - 9
    first = np.maximum(last - 5, 0)
    first[1] = last[1] - 20  # a window that begins before the buffer, or in a block before the last
    expected = np.zeros((2, 4, 6, size))
    for row, window, head in np.ndindex(2, 4, 6):
        seen = slice(max(first[row, window], 0), last[row, window] + 1)
        scores = k[row, head // 2, seen] @ q[row, head, window] * (scale or 1 / np.sqrt(10))
        weights = np.exp(cap * np.tanh(scores / cap) if cap else scores)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
        expected[row, window, head] = weights / total @ v[row, head // 2, seen]
    run = functools.partial(attend, scale=scale, cap=cap)
    arguments = (q, k, v, first, last, sinks)
    ours = quick_jit(lambda *arguments: run(*arguments))(*arguments)
    assert error(ours, expected.reshape(2, 4, -1)) <= 1e-5


def test_attention_by_queries_has_the_derivatives_of_its_formula():
    random = np.random.RandomState(2)
    q, k, v = (random.standard_normal(n).astype(np.float32) for n in ((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4)))
    last = np.array([[2, 3, 4]], np.int32)

    def plain(q, k, v, sinks):
        scores = 2.0 * jnp.tanh(jnp.einsum("bhwd,bgsd->bhws", q, k) * 0.7 / 2.0)
        weights = jnp.exp(jnp.where(jnp.arange(5)[None, None, :] <= last[..., None], scores, -jnp.inf))
        total = weights.sum(-1) + jnp.exp(sinks)[None, :, None]
        return jnp.sum(jnp.sin(jnp.einsum("bhws,bgsd->bwhd", weights / total[..., None], v)))

    def ours(q, k, v, sinks):
        out = attend(q, k, v, np.zeros_like(last), last, sinks, scale=0.7, cap=2.0)
        return jnp.sum(jnp.sin(out.reshape(1, 3, 2, 4)))

    arguments = (q, k, v, np.array([0.3, -0.2], np.float32))
    for found, expected in zip(*(quick_jit(jax.grad(f, argnums=(0, 1, 2, 3)))(*arguments) for f in (ours, plain)), strict=True):
        assert error(found, expected) <= 1e-4


def test_values_of_another_size_and_sinks():
    """No family here has them yet: windows give what one pass gives, caches have the sizes, and the sinks count."""
    config = tiny.shape(97, 24, 40, 2, 4, 2, 8, 128)
    mixer = dataclasses.replace(config.layers[0].mixer, value_dim=6, sinks=True)
    network = Network(dataclasses.replace(config, layers=(dataclasses.replace(config.layers[0], mixer=mixer),) * 2))
    random = np.random.RandomState(3)
    params = {name: random.standard_normal(t.shape).astype(np.float32) / 2 for name, t in network.tensors().items()}
    assert params["model.layers.1.self_attn.o_proj.weight"].shape == (24, 24)
    assert params["model.layers.1.self_attn.sinks"].shape == (4,)
    cache = network.init_cache(params, B, S)
    assert (cache[0].k.shape, cache[0].v.shape) == ((B, 2, S, 8), (B, 2, S, 6))
    one = whole(network, params)
    assert error(single_steps(network, params, cache)[0], one) <= 1e-5
    without = {name: leaf - 100 * name.endswith("sinks") for name, leaf in params.items()}
    assert error(whole(network, without), one) > 1e-2


def test_tensors_say_what_may_be_split_and_cast(models):
    tensors = models("gemma3")[0].untied.tensors()
    layer = "model.layers.2"
    assert list(tensors)[:2] == [HEAD, EMBEDDING]
    assert {name: tensors[name].axes for name in (HEAD, EMBEDDING)} == dict.fromkeys((HEAD, EMBEDDING), ("model", None))
    linear = {name.removeprefix(f"{layer}.") for name, tensor in tensors.items() if tensor.linear and name.startswith(layer)}
    assert linear == {f"self_attn.{x}_proj.weight" for x in "qkvo"} | {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    assert {name for name, tensor in tensors.items() if tensor.linear and ".layers." not in name} == {HEAD}
    assert all(tensor.sources == (Source((name,)),) for name, tensor in tensors.items())


def test_a_source_of_a_module_is_that_of_its_tensors(models):
    config = models("llama_bias")[0].config
    fused = Source(("model.layers.*.self_attn.qkv",), 3, 2, 5)
    sources = (("model.layers.*.self_attn.k_proj", fused), ("model.norm", Source(("model.final",))))
    tensors = Network(dataclasses.replace(config, sources=sources)).tensors()
    for i, kind in ((0, "weight"), (1, "bias")):
        found = tensors[f"model.layers.{i}.self_attn.k_proj.{kind}"].sources
        assert found == (Source((f"model.layers.{i}.self_attn.qkv.{kind}",), 3, 2, 5),)
    assert tensors["model.norm.weight"].sources == (Source(("model.final.weight",)),)
    assert tensors["model.layers.1.self_attn.q_proj.weight"].sources == (Source(("model.layers.1.self_attn.q_proj.weight",)),)


def test_a_masked_nan_is_harmless(models):
    """A token whose keys overflow must not poison those that never see it (0 * NaN is NaN)."""
    network, params = models("llama_linear")
    cache = network.init_cache(params, B, S)
    broken = params | {"model.embed_tokens.weight": params["model.embed_tokens.weight"].at[5].set(jnp.nan)}
    _, cache = apply(network, broken, np.full((B, 1), 5, np.int32), np.array([20, 20], np.int32), cache)
    assert np.all([np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(cache)])


def test_init_gives_every_parameter(models):
    for family in ("llama3", "qwen3_bias", "gemma3"):
        network, params = models(family)
        made = jax.eval_shape(functools.partial(network.init, 3, jnp.bfloat16))
        assert {name: leaf.shape for name, leaf in made.items()} == {name: leaf.shape for name, leaf in params.items()}
        assert {leaf.dtype.name for leaf in made.values()} == {"bfloat16"}
    config = models("llama_bias")[0].config
    small = dataclasses.replace(config, layers=config.layers[:1])
    made = quick_jit(lambda: Network(small).init(3, stddev=0.5))()
    assert 0.45 < np.std(made["lm_head.weight"]) < 0.55
    assert np.all(made["model.norm.weight"] == 1)
    assert np.all(made["model.layers.0.mlp.up_proj.bias"] == 0)
    assert np.all(RMSNorm(5, Norm(1e-6, 1.0)).weight.get_value() == 0)  # one, with its offset
    assert error(made["model.layers.0.mlp.up_proj.weight"], made["model.layers.0.mlp.gate_proj.weight"]) > 0.1


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
        assert error(ours.self_attn(x, positions, (cos, sin), None)[0], expected) <= TOLERANCE


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


def test_write_puts_each_row_at_its_own_positions():
    cache = KVCache(jnp.zeros((2, 1, 6, 1)), jnp.zeros((2, 1, 6, 1)))
    values = jnp.arange(1.0, 5).reshape(2, 1, 2, 1)
    k, v = write(cache, values, 10 * values, jnp.array([1, 4]))
    np.testing.assert_array_equal(k[:, 0, :, 0], [[0, 1, 2, 0, 0, 0], [0, 0, 0, 0, 3, 4]])
    np.testing.assert_array_equal(v, 10 * k)
