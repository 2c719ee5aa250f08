"""What is compiled: one trace for many requests (law 7); a loop that calls nobody, copies no cache, widens no weight (law 8)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import HOST_OPERATIONS, aliased, cache_copies, widened
from tiny import shape

from mlspecqd_jax import generation, requests, stacks
from mlspecqd_jax.folds import BLOCK
from mlspecqd_jax.loading import models
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.speculation import loop
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.text.card import Card

# Sizes that no activation shares, so that a weight or a cache is known by its shape.
MIDDLE = 88
CONFIG = shape(97, 32, MIDDLE, 2, 6, 3, 12, 512)
SMALL = shape(97, 40, 104, 1, 6, 3, 20, 512)
GEMMA = shape(97, 32, MIDDLE, 2, 6, 3, 12, 1024, "gemma2", attn_logit_softcapping=5.0, sliding_window=40)
PROMPT = [3, 1, 4, 1, 5]


def cache_shape(config, size=256):
    return 1, config.layers[0].mixer.kv_heads, size, config.layers[0].mixer.head_dim


def weight_shapes():
    return {tensor.shape for config in (CONFIG, SMALL) for tensor in Network(config).tensors().values() if len(tensor.shape) == 2}


def request(stack, prompt=PROMPT, max_new_tokens=20, **settings):
    """The arguments of `generate_tokens`, as `generate` makes them."""
    batch = requests.prepare(stack, [prompt], max_new_tokens=max_new_tokens)
    return batch.tokens, batch.length, batch.limit, Sampling.create(1, CONFIG.vocab_size, **settings)


def random_model(config, name):
    network, rng = Network(config), np.random.default_rng(0)
    params = {name: jnp.asarray(0.1 * rng.normal(size=t.shape), jnp.bfloat16) for name, t in network.tensors().items()}
    card = Card(name, config.vocab_size, config.max_positions, None, (5,))
    return models.Model(network, params, card, pathlib.Path())


@pytest.fixture(
    scope="module", params=["plain", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("three levels", "auto"))]
)
def stack(request):
    """Random models in bfloat16: a target alone; or with its twin, on the same cache, and a small model, on a cache of its own.

    With lengths="auto" each level has windows of several widths, and drafts by a model or by look-up.
    """
    models.enable_compilation_cache()  # what is compiled to be read is not compiled again to be run
    target, small = random_model(CONFIG, "target"), random_model(SMALL, "small")
    lengths = "auto" if request.param == "auto" else "fixed"
    return stacks.stack(target, *[(target.quantized(), 6), (small, 3)] * (request.param != "plain"), lengths=lengths)


PROGRAMS = pytest.mark.parametrize("name", ["feed", "advance", pytest.param("generate_tokens", marks=pytest.mark.exhaustive)])


@pytest.fixture(scope="module")
def program(stack):
    """Optimized HLO by name: prefill, the decode loop, and both in one."""
    tokens, length, limit, sampling = request(stack)
    state = jax.eval_shape(lambda *arguments: loop.init(*arguments, prefill_width=16), stack, tokens, length, sampling)
    whole = jax.jit(loop.generate_tokens, static_argnames="prefill_width")
    lowered = {
        "feed": lambda: generation.programs(stack).feed.lower(
            stack, state, prefill_width=16, first=np.int32(0), pieces=np.int32(1)
        ),
        "advance": lambda: generation.programs(stack).advance.lower(stack, state, limit, sampling, np.int32(1)),
        "generate_tokens": lambda: whole.lower(stack, tokens, length, limit, sampling, prefill_width=16),
    }
    return functools.cache(lambda name: lowered[name]().compile().as_text())


@PROGRAMS
def test_nothing_leaves_the_device_within_a_call(program, name):
    assert not HOST_OPERATIONS.search(program(name))


def test_a_callback_would_be_seen():
    def spoken(x):
        jax.debug.callback(lambda y: None, x)
        return x + 1

    assert HOST_OPERATIONS.search(jax.jit(spoken).lower(1.0).compile().as_text())


@PROGRAMS
def test_the_loop_copies_no_cache(program, name):
    for level in (CONFIG, SMALL):
        assert not cache_copies(program(name), cache_shape(level)[1:])


def test_a_copy_of_a_cache_would_be_seen():
    """A loop that swaps two caches has to copy."""
    caches = [jnp.zeros(cache_shape(CONFIG), jnp.bfloat16)] * 2

    def body(carry):
        i, a, b = carry
        return i + 1, b, a.at[0, 0, i].set(b[0, 1, i])

    swap = jax.jit(lambda a, b: jax.lax.while_loop(lambda carry: carry[0] < 9, body, (0, a, b)))
    assert cache_copies(swap.lower(*caches).compile().as_text(), cache_shape(CONFIG)[1:])


@pytest.mark.parametrize("name", ["feed", "advance"])
def test_the_donated_caches_are_updated_where_they_are(program, stack, name):
    for config in (CONFIG, SMALL) if len(stack.levels) > 1 else (CONFIG,):
        caches, in_place = aliased(program(name), "bf16", cache_shape(config))
        assert len(caches) == 2 * len(config.layers)  # a shared cache counts once
        assert in_place == caches


@pytest.mark.parametrize("name", ["feed", "advance"])
def test_bounded_attention_reads_the_caches_where_they_are(name):
    """Gemma 2's: no cache is copied or widened, and the donated ones are updated in place."""
    stack = stacks.stack(random_model(GEMMA, "gemma"))
    tokens, length, limit, sampling = request(stack, max_new_tokens=300)
    size = tokens.shape[1]
    assert size > BLOCK
    state = jax.eval_shape(lambda *arguments: loop.init(*arguments, prefill_width=16), stack, tokens, length, sampling)
    programs = generation.programs(stack)
    if name == "feed":
        lowered = programs.feed.lower(stack, state, prefill_width=16, first=np.int32(0), pieces=np.int32(1))
    else:
        lowered = programs.advance.lower(stack, state, limit, sampling, np.int32(1))
    hlo = lowered.compile().as_text()
    assert not cache_copies(hlo, cache_shape(GEMMA, size)[1:])
    caches, in_place = aliased(hlo, "bf16", cache_shape(GEMMA, size))
    assert len(caches) == 2 * len(GEMMA.layers)
    assert in_place == caches


@PROGRAMS
def test_no_weight_is_widened(program, name):
    """Neither a plain one nor one that is decoded."""
    assert not widened(program(name), weight_shapes())


def test_a_widened_weight_would_be_seen():
    """A product in f32 widens its 16-bit weight, once, outside of the loop."""
    weight = jnp.zeros((MIDDLE, CONFIG.hidden_size), jnp.bfloat16)

    def multiply(weight, n):
        def body(carry):
            i, x = carry
            return i + 1, (x @ weight.astype(jnp.float32).T) @ jnp.ones((MIDDLE, CONFIG.hidden_size)) + i

        return jax.lax.while_loop(lambda carry: carry[0] < n, body, (0, jnp.zeros((2, CONFIG.hidden_size))))

    assert widened(jax.jit(multiply).lower(weight, 9).compile().as_text(), weight_shapes())


REQUESTS = [
    {"prompt": [7, 8]},
    {"prompt": list(range(16)), "max_new_tokens": 3},
    {"max_new_tokens": 25},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.5, "min_p": 0.1},
    {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.3},
    {"temperature": 1, "seed": 123},
    {"stop_token_ids": [1, 2, 3, 4, 5, 6, 7]},
]


def test_generate_tokens_traces_once_for_many_requests(stack):
    traces = []

    @jax.jit
    def counted(*arguments):
        traces.append(1)
        return loop.generate_tokens(*arguments)

    for settings in REQUESTS:
        jax.eval_shape(counted, stack, *request(stack, **settings))
    assert len(traces) == 1
    # What is static does make a trace, so the counter counts.
    for settings in ({"rule": "rejection"}, {"logprobs": True}, {"max_new_tokens": 300}, {"stop_token_ids": range(9)}):
        jax.eval_shape(counted, stack, *request(stack, **settings))
    assert len(traces) == 5


def test_generate_traces_once_for_many_requests(stack):
    before = [f._cache_size() for f in generation.programs(stack)]
    for settings in REQUESTS:
        arguments = {"max_new_tokens": 20} | settings
        out = generation.generate(stack, [arguments.pop("prompt", PROMPT)], **arguments)
        assert 1 <= len(out.tokens[0]) <= 25
    assert [f._cache_size() for f in generation.programs(stack)] == [n + 1 for n in before]
