"""With the C++ kernels a position's bfloat16 logits are bit for bit the same for every window, cache length and batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
import mlspecqd_jax as mlsd

pytestmark = pytest.mark.skipif(not cpu_kernels.isas("attention"), reason="needs a C++ compiler")

FED, WIDEST = 20, 16  # tokens in the cache, and of the widest window


@pytest.fixture(scope="module")
def demo():
    return mlsd.load("demo")


@pytest.fixture(scope="module")
def tokens(demo):
    return np.random.RandomState(0).randint(0, demo.network.vocab_size, (3, FED + WIDEST)).astype(np.int32)


def logits(demo, params, tokens, window, slots):
    """Return the logits [B, window, V] of what follows the first FED tokens."""

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(params, tokens, window, slots):
        cache = demo.network.init_cache(tokens.shape[0], slots, params)
        start = jnp.zeros((tokens.shape[0],), jnp.int32)
        _, cache = demo.network(params, tokens[:, :FED], start, cache)
        return demo.network(params, tokens[:, FED : FED + window], start + FED, cache)[0]

    return np.asarray(run(params, tokens, window, slots))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "mxfp4"])
def test_every_window_gives_the_same_bits(demo, tokens, weights):
    params = demo.params if weights == "bfloat16" else demo.quantized().params
    widest = logits(demo, params, tokens, WIDEST, 64)
    for window in (2, 3, 5, 8):
        np.testing.assert_array_equal(logits(demo, params, tokens, window, 64), widest[:, :window])
    np.testing.assert_array_equal(logits(demo, params, tokens, WIDEST, 160), widest)
    np.testing.assert_array_equal(logits(demo, params, tokens[1:2], WIDEST, 64), widest[1:2])
    np.testing.assert_array_equal(logits(demo, params, tokens, 1, 64), widest[:, :1])
