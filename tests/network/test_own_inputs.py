"""Layers that read earlier ones' keys and values, and an embedding of which each has a part (Gemma 4)."""

import family_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import parse
from hlo import widened

from mlspecqd_jax.network import layers, network
from mlspecqd_jax.network.moments import second_moments
from mlspecqd_jax.weights.tensors import HEAD

TABLE = "model.own_inputs.embed_tokens.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(network, random parameters in bfloat16)."""
    found = network.Network(parse(tmp_path_factory.mktemp("model"), family_files.CONFIGS["gemma4"]))
    shapes = {name: tensor.shape for name, tensor in found.tensors().items()}
    return found, {name: jnp.asarray(family_files.drawn(name, shape), jnp.bfloat16) for name, shape in shapes.items()}


def test_layers_that_read_earlier_ones_keep_nothing(model):
    found, params = model
    caches = found.init_cache(params, 2, 9)
    assert [None if cache is None else cache.k.shape for cache in caches] == [
        *((2, 2, 9, 14), (2, 2, 9, 18), (2, 2, 9, 14)),
        *(None, None),
    ]
    names = [name for name in found.tensors() if ".layers.3.self_attn." in name or ".layers.4.self_attn." in name]
    assert {name.rpartition("self_attn.")[2] for name in names} == {"q_proj.weight", "o_proj.weight", "q_norm.weight"}


def test_no_pass_reads_the_whole_table(model):
    """Nor any row that no token has, and no copy of it is made (law 8)."""
    found, params = model
    tokens, start = jnp.array([[3, 8, 1, 3]], jnp.int32), jnp.zeros(1, jnp.int32)
    caches = found.init_cache(params, 1, 6)
    compiled = jax.jit(lambda *given: found(*given)[:2]).lower(params, tokens, start, caches).compile()
    assert not widened(compiled.as_text(), [params[TABLE].shape])
    logits = np.asarray(compiled(params, tokens, start, caches)[0])
    others = ~jnp.isin(jnp.arange(67), tokens)
    poisoned = params | {TABLE: jnp.where(others[:, None], jnp.nan, params[TABLE])}
    np.testing.assert_array_equal(np.asarray(compiled(poisoned, tokens, start, caches)[0]), logits)
    poisoned = params | {TABLE: params[TABLE].at[8].set(jnp.nan)}
    assert np.isnan(np.asarray(compiled(poisoned, tokens, start, caches)[0])[0, 1:]).any()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("compiled_quickly")
def test_moments_are_those_of_what_each_weight_multiplies(model, monkeypatch):
    """Also where a layer reads another one's keys and values, and of what is before the layers."""
    found, params = model
    tokens = jax.random.randint(jax.random.key(0), (3, 11), 0, 61)
    counted = jnp.arange(33.0).reshape(3, 11) % 3
    moments = {}
    for each in second_moments(found, params, tokens, counted):
        moments |= each
    given, plain = {}, layers.linear
    names = {id(leaf): name for name, leaf in params.items()} | {id(params["model.embed_tokens.weight"]): HEAD}

    def linear(x, w, **how):
        given[names[id(w)]] = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        return plain(x, w, **how)

    monkeypatch.setattr(layers, "linear", linear)
    with found.module(params) as module:
        module(tokens, jnp.zeros(3, jnp.int32), None)
    assert moments.keys() == given.keys() == {name for name, t in found.tensors().items() if t.linear} | {HEAD}
    for name, x in given.items():
        expected = x.T @ (x * np.asarray(counted).reshape(-1, 1))
        np.testing.assert_allclose(moments[name], expected, rtol=0.02, atol=0.02 * np.abs(expected).max(), err_msg=name)
