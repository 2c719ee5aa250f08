"""The network against transformers' torch models: recorded logits of every family, and live ones where torch is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiling import quick_jit
from recorded import TOLERANCE, error, families, reference
from windows import in_use

import cpu_kernels
from mlspecqd_jax.network.config import Norm
from mlspecqd_jax.network.layers import RMSNorm
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.quantization import quantize_params
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD, Source

B, T = tiny.TOKENS
S = T + 8  # cache positions, more than the tokens need


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


@pytest.mark.skipif(not cpu_kernels.isas("attention"), reason="needs a C++ compiler")
@pytest.mark.parametrize(("family", "format"), [("llama3", None), ("gemma3", "mxfp4")])
def test_what_only_pads_is_not_computed(models, family, format):
    """In bfloat16: positions with a token have the bits of windows full of tokens, and no slot is written but theirs (C7, C13)."""
    network, params = models(family)
    params = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}
    params = params if format is None else quantize_params(params, network.tensors(), format)
    tokens, fed, width = np.concatenate([tiny.tokens(), tiny.tokens()[:1, ::-1]]), np.array([9, 2, 5], np.int32), 6
    start = np.zeros(3, np.int32)
    cache = apply(network, params, tokens[:, :9], start, network.init_cache(params, 3, S))[1]
    window = np.stack([row[at : at + width] for row, at in zip(tokens, fed, strict=True)])
    logits, full = apply(network, params, window, fed, cache)
    beyond = (np.arange(S) >= fed[:, None])[:, None, :, None]
    empty = jax.tree.map(lambda leaf: jnp.where(beyond, jnp.nan, leaf), cache)
    for used in ([6, 6, 6], [1, 4, 2], [0, 6, 3], [5, 0, 0], [0, 0, 0]):
        rows = in_use(np.array(used), width)
        found, written = apply(network, params, np.where(rows, window, -1), fed, empty)
        np.testing.assert_array_equal(found[rows], logits[rows])
        for ours, theirs, before in zip(*map(jax.tree.leaves, (written, full, empty)), strict=True):
            here = beyond & (np.arange(S) < (fed + used)[:, None])[:, None, :, None]
            np.testing.assert_array_equal(np.float32(ours), np.where(here, theirs, before).astype(np.float32))


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
