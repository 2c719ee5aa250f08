"""With the C++ kernels a position's bfloat16 logits are bit for bit the same for every window, cache length and batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import shape

import cpu_kernels
import mlspecqd_jax as mlsd
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.quantization import quantize_params

pytestmark = pytest.mark.skipif(not cpu_kernels.isas("attention"), reason="needs a C++ compiler")

FED, WIDEST = 20, 16  # tokens in the cache, and of the widest window


# One layer each, in the widths of models that people use: hidden, intermediate, layers, heads, key/value heads, size of a head.
WIDE = {
    "llama": shape(300, 2048, 5632, 1, 32, 4, 64, 1024),
    "qwen2.5": shape(300, 896, 4864, 1, 14, 2, 64, 1024, "qwen2"),
    "qwen3": shape(300, 1024, 3072, 1, 16, 8, 128, 1024, "qwen3"),
}


def random_model(config):
    """Return (network, parameters) of a model with random weights."""
    network = Network(config)
    random = {name: jax.random.normal(jax.random.key(i), t.shape) for i, (name, t) in enumerate(network.tensors().items())}
    return network, {name: (w / w.shape[-1] ** 0.5 + (w.ndim == 1)).astype(jnp.bfloat16) for name, w in random.items()}


@pytest.fixture(scope="module", params=["demo", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in WIDE)])
def model(request):
    """A network and its parameters."""
    if request.param != "demo":
        return random_model(WIDE[request.param])
    demo = mlsd.load("demo")
    return demo.network, demo.params


@pytest.fixture(scope="module")
def tokens(model):
    return np.random.RandomState(0).randint(0, model[0].vocab_size, (3, FED + WIDEST)).astype(np.int32)


def logits(network, params, tokens, window, slots):
    """Return the logits [B, window, V] of what follows the first FED tokens."""

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(params, tokens, window, slots):
        cache = network.init_cache(params, tokens.shape[0], slots)
        start = jnp.zeros((tokens.shape[0],), jnp.int32)
        _, cache, _ = network(params, tokens[:, :FED], start, cache)
        return network(params, tokens[:, FED : FED + window], start + FED, cache)[0]

    return np.asarray(run(params, tokens, window, slots))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["mxfp4", pytest.param("bfloat16", marks=pytest.mark.exhaustive)])
def test_every_window_gives_the_same_bits(model, tokens, weights):
    network, params = model
    run = functools.partial(logits, network, params if weights == "bfloat16" else quantize_params(params, network.tensors()))
    widest = run(tokens, WIDEST, 64)
    for window in (1, 3, 8):
        np.testing.assert_array_equal(run(tokens, window, 64), widest[:, :window])
    np.testing.assert_array_equal(run(tokens, WIDEST, 160), widest)
    for window in (1, WIDEST):
        np.testing.assert_array_equal(run(tokens[1:2], window, 64), widest[1:2, :window])
