"""Latent attention: what is kept, products by head in any window, and a loop that copies no latents."""

import dataclasses
import functools

import family_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import parse
from hlo import cache_copies

import cpu_kernels
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.network.ops import head_linear

HEADS, N, K = 5, 48, 64
ALONE = 1 if cpu_kernels.isas("matmul") else 2  # rows: XLA's products of one row are others


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_product_by_head_is_alike_in_all_windows(dtype):
    x, w = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(((4, 9, HEADS, K), (HEADS * N, K))))
    run = jax.jit(head_linear)
    whole = np.asarray(run(x, w))
    expected = np.einsum("bwhk,hnk->bwhn", np.asarray(x, np.float64), np.asarray(w, np.float64).reshape(HEADS, N, K))
    np.testing.assert_allclose(whole.astype(np.float64), expected, rtol=1e-2, atol=0.1 if dtype == "bfloat16" else 1e-4)
    for batch, width in ((1, ALONE), (2, 6), (4, 2)):
        np.testing.assert_array_equal(np.asarray(run(x[:batch, :width], w)), whole[:batch, :width])
    used = jnp.array([0, 3, 9, 1], jnp.int32)
    rows = np.arange(9)[None] < np.asarray(used)[:, None]
    found = np.asarray(jax.jit(functools.partial(head_linear, used=used))(jnp.where(rows[..., None, None], x, jnp.nan), w))
    if ALONE == 1:
        np.testing.assert_array_equal(found[rows], whole[rows])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(network, random parameters in bfloat16)."""
    network = Network(parse(tmp_path_factory.mktemp("model"), family_files.CONFIGS["deepseek_v3"]))
    shapes = {name: tensor.shape for name, tensor in network.tensors().items()}
    return network, {name: jnp.asarray(family_files.drawn(name, shape), jnp.bfloat16) for name, shape in shapes.items()}


def test_what_is_kept_is_a_latent_and_a_key_of_all_heads(model):
    network, params = model
    assert [(cache.k.shape, cache.v) for cache in network.init_cache(params, 2, 9)[:3]] == [((2, 1, 9, 16 + 8), None)] * 3


def test_a_loop_copies_no_latents(model):
    """Nor takes them apart (law 8): they are keys and values at once."""
    network, params = model
    network = Network(dataclasses.replace(network.config, layers=network.config.layers[:1]))
    params = {name: params[name] for name in network.tensors()}
    caches = network.init_cache(params, 1, 37)

    @jax.jit
    def run(params, caches):
        def step(i, carry):
            tokens, caches = carry
            logits, caches, _ = network(params, tokens, jnp.full((1,), i, jnp.int32), caches)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), caches

        return jax.lax.fori_loop(0, 30, step, (jnp.zeros((1, 1), jnp.int32), caches))

    text = run.lower(params, caches).compile().as_text()
    assert "[1,1,37,24]" in text
    assert not cache_copies(text, (37, 24))
    assert not cache_copies(text, (37, 16))
