"""A position's bits depend on its own row alone (C7): at real widths, for every operation and for whole models, on CPU.

Rows are computed alone, and among as many others as batches and windows make of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import shape
from windows import in_use, numbers_in_use

import cpu_kernels
from mlspecqd_jax.folds import ordered_logsumexp, ordered_softmax, ordered_sum
from mlspecqd_jax.network.config import Norm
from mlspecqd_jax.network.families import config_of
from mlspecqd_jax.network.layers import ACTIVATIONS
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.network.ops import attend, layer_norm, linear, rms_norm, rotary, rotate, row_multiple
from mlspecqd_jax.network.rope import rope_of
from mlspecqd_jax.speculation import choosing
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.weights.cast import quantize

IN_CPP = bool(cpu_kernels.isas("matmul"))
ROWS = (1, 2, 6, 10, 33, 64)
WIDTHS = (576, 1536, 2048)
DTYPES = ("bfloat16", "float16", "float32") if IN_CPP else ("bfloat16",)
FEWEST = 1 if IN_CPP else 2  # rows: XLA's products of one row are others


def random(seed, shape, dtype="float32"):
    return (3 * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def assert_rows_alike(run, *arrays, rows=ROWS):
    """Assert that run(arrays) has the same bits in each row, whatever number of rows is computed."""
    run = jax.jit(run)
    whole = [np.asarray(leaf) for leaf in jax.tree.leaves(run(*(array[: rows[-1]] for array in arrays)))]
    for m in rows[:-1]:
        for begin in {0, rows[-1] - m}:
            part = jax.tree.leaves(run(*(array[begin : begin + m] for array in arrays)))
            for found, expected in zip(part, whole, strict=True):
                np.testing.assert_array_equal(np.asarray(found), expected[begin : begin + m], err_msg=f"{m} rows from {begin}")


def assert_positions_in_use_alike(w, x):
    """Assert that those of x [B, W, K] in use are multiplied as in the whole, whatever the others are."""
    whole, run = np.asarray(linear(x, w)), jax.jit(linear)
    for used in numbers_in_use(*x.shape[:2]):
        rows = in_use(used, x.shape[1])
        found = np.asarray(run(jnp.where(rows[..., None], x, jnp.nan), w, used=used))
        np.testing.assert_array_equal(found[rows], whole[rows])


def test_the_harness_sees_a_norm_whose_sums_xla_orders():
    """The formula that was there before: its mean changes with the number of elements."""

    def norm(x):
        y = x.astype(jnp.float32)
        return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)).astype(jnp.float32)

    with pytest.raises(AssertionError, match="rows from"):
        assert_rows_alike(norm, random(0, (64, 576)))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [WIDTHS[0], *(pytest.param(k, marks=pytest.mark.slow) for k in WIDTHS[1:])])
def test_norms(k, dtype, offset):
    weight = random(1, (k,), dtype)
    assert_rows_alike(lambda x: rms_norm(x, weight, Norm(1e-5, offset)), random(0, (64, k), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norms(dtype):
    weight, bias = random(1, (576,), dtype), random(2, (576,), dtype)
    x, norm = random(0, (64, 576), dtype), Norm(1e-5, 1.0, centered=True)
    assert_rows_alike(lambda x: layer_norm(x, weight, bias, norm), x)
    x, weight, bias = (array.astype(jnp.float32) for array in (x, weight, bias))
    y = x - x.mean(axis=-1, keepdims=True)
    expected = y / jnp.sqrt((y * y).mean(axis=-1, keepdims=True) + 1e-5) * (1 + weight[None]) + bias[None]
    found = layer_norm(*(array.astype(dtype) for array in (x, weight, bias)), norm).astype(jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=2e-5 if dtype == "float32" else 8e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_between_sums_as_gemma_s_layers_have_them(dtype):
    """What XLA fuses: a scaled embedding, a norm, a sum of both, and another norm."""
    weight = random(1, (640,), dtype)

    def run(x, y):
        x = x * jnp.asarray(640**0.5, x.dtype)
        x = x + rms_norm(y, weight, Norm(1e-6, 1.0))
        return x, rms_norm(x, weight, Norm(1e-6, 1.0))

    assert_rows_alike(run, random(0, (64, 640), dtype), random(2, (64, 640), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", WIDTHS)
def test_products(k, dtype):
    w = random(1, (384, k), dtype)
    assert row_multiple([w], dtype, "cpu") == FEWEST
    assert_rows_alike(functools.partial(linear, w=w), random(0, (64, k), dtype), rows=[m for m in ROWS if m >= FEWEST])
    if IN_CPP:
        assert_positions_in_use_alike(w, random(0, (3, 6, k), dtype))


@pytest.mark.skipif(not IN_CPP, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("format", "dtype"),
    [("mxfp4", "bfloat16"), ("mxfp6_e2m3", "bfloat16"), ("mxfp8_e4m3", "bfloat16"), ("int4_g32", "bfloat16"), ("mxfp4", "float32")],
)
def test_quantized_products(format, dtype):
    w = quantize(random(1, (384, 576), "bfloat16"), format)
    assert row_multiple([w], dtype, "cpu") == 1
    assert_rows_alike(functools.partial(linear, w=w), random(0, (64, 576), dtype))
    assert_positions_in_use_alike(w, random(0, (3, 6, 576), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_windows_batches_and_buffers(dtype):
    if not IN_CPP:
        pytest.skip("without C++ windows are padded and buffers are alike")
    heads, kv, depth, slots = 9, 3, 64, 256
    q, k, v = (random(i, (8, n, m, depth), dtype) for i, (n, m) in enumerate(((heads, 8), (kv, slots), (kv, slots))))
    last = 40 + 20 * jnp.arange(8)[:, None] + jnp.arange(8)[None, :]
    run = jax.jit(attend)
    whole = np.asarray(run(q, k, v, jnp.zeros_like(last), last))
    for window in (1, 6):
        found = run(q[:, :, :window], k, v, jnp.zeros_like(last[:, :window]), last[:, :window])
        np.testing.assert_array_equal(np.asarray(found), whole[:, :window])
    for batch in (3,):
        found = run(q[:batch], k[:batch], v[:batch], jnp.zeros_like(last[:batch]), last[:batch])
        np.testing.assert_array_equal(np.asarray(found), whole[:batch])
    more = [jnp.pad(array, ((0, 0), (0, 0), (0, 256), (0, 0)), constant_values=7) for array in (k, v)]
    np.testing.assert_array_equal(np.asarray(run(q, *more, jnp.zeros_like(last), last)), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "groups"), [("bfloat16", 1), *((dtype, groups) for dtype in DTYPES for groups in (2, 3))])
def test_attention_that_is_capped_or_scaled_over_windows_batches_and_buffers(dtype, groups):
    """XLA's form on CPU, with or without the C++ kernels."""
    kv, depth, slots = 3, 64, 512
    shapes = ((kv * groups, 8, depth), (kv, slots, depth), (kv, slots, 48))
    q, k, v = (random(i, (8, *shape), dtype) for i, shape in enumerate(shapes))
    last = 180 + 20 * jnp.arange(8)[:, None] + jnp.arange(8)[None, :]  # across the edge of a block
    first = jnp.where(jnp.arange(8)[:, None] % 2 == 0, last - 100, 0)
    sinks = random(3, (kv * groups,), dtype)

    @jax.jit
    def run(q, k, v, first, last):
        return attend(q, k, v, first, last, sinks, scale=0.07, cap=20.0)

    whole = np.asarray(run(q, k, v, first, last))
    for batch, window in ((8, 6), (3, 8), (1, 1)):
        found = run(q[:batch, :, :window], k[:batch], v[:batch], first[:batch, :window], last[:batch, :window])
        np.testing.assert_array_equal(np.asarray(found), whole[:batch, :window])
    more = [jnp.pad(array, ((0, 0), (0, 0), (0, 300), (0, 0)), constant_values=7) for array in (k, v)]
    np.testing.assert_array_equal(np.asarray(run(q, *more, first, last)), whole)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_activations(activation):
    for dtype in ("bfloat16", "float32"):
        x, up = random(0, (64, 1536), dtype), random(1, (64, 1536), dtype)
        assert_rows_alike(lambda x, up: ACTIVATIONS[activation](x) * up, x, up, rows=(1, 2, 6, 16, 64))


@pytest.mark.slow
def test_rotations():
    rope = rope_of({"rope_type": "default", "rope_theta": 100000.0}, 64)
    position = jnp.asarray(np.random.RandomState(0).randint(0, 8192, (64, 1)), jnp.int32)
    x = random(0, (64, 1, 9, 64), "bfloat16")
    assert_rows_alike(lambda x, position: rotate(x, *rotary(position, rope)), x, position)


@pytest.mark.parametrize("k", [100, pytest.param(4099, marks=pytest.mark.slow)])
def test_folds(k):
    rows = (1, 8, 33)
    assert_rows_alike(lambda x: (ordered_sum(x), ordered_softmax(x), ordered_logsumexp(x)), random(0, (33, k)), rows=rows)


@pytest.mark.slow
def test_folds_do_not_see_the_end_of_a_buffer():
    x, softmax, total = random(0, (4, 700)), jax.jit(ordered_softmax), jax.jit(ordered_sum)
    for more in (10, 1000):
        filled = jnp.pad(x, ((0, 0), (0, more)), constant_values=-jnp.inf)
        np.testing.assert_array_equal(np.asarray(softmax(filled))[:, :700], np.asarray(softmax(x)))
        zeros = jnp.pad(x, ((0, 0), (0, more)))
        np.testing.assert_array_equal(np.asarray(total(zeros)), np.asarray(total(x)))


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [50257, pytest.param(49152, marks=pytest.mark.exhaustive)])
def test_the_choice_of_a_token_and_its_log_probability(vocab):
    """With noise and every filter, over a vocabulary of a real model and one of odd size."""
    logits, tokens = random(0, (12, 1, vocab)), jnp.zeros((12, 64), jnp.int32)

    def run(logits, seed):
        filters = {"temperature": 0.8, "top_k": 400, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.2}
        s = Sampling.create(len(logits), vocab, **filters)
        position = jnp.full((len(logits), 1), 20, jnp.int32)
        adjusted = choosing.adjust(logits, tokens[: len(logits)], position, s)
        noise = choosing.noise(seed, position, 0, choosing.DRAW)
        chosen = choosing.draw(adjusted, noise, s)
        return choosing.log_probability(logits, chosen), adjusted, chosen, choosing.gumbel(noise, vocab)

    assert_rows_alike(run, logits, jnp.arange(12, dtype=jnp.uint32), rows=(1, 5, 12))


WIDE = {"vocab_size": 8192, "hidden_size": 640, "intermediate_size": 1280, "num_hidden_layers": 2, "num_attention_heads": 10}
WIDE |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {"tie_word_embeddings": True, "sliding_window": 12}
GEMMA4 = WIDE | {"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 1, "global_head_dim": 512, "num_experts": 8}
GEMMA4 |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "top_k_experts": 3, "hidden_size_per_layer_input": 96}
GEMMA4 |= {"vocab_size_per_layer_input": 8192, "enable_moe_block": True, "moe_intermediate_size": 384}
LATENT = WIDE | {"kv_lora_rank": 256, "q_lora_rank": 320, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 96}
LATENT |= {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 384}
# Hidden, intermediate, query heads, key/value heads, size of a head, vocabulary: of models that people use, one layer each.
SHAPES = {
    "576": shape(49152, 576, 1536, 1, 9, 3, 64, 2048, tie_word_embeddings=True),
    "1024": shape(151936, 1024, 3072, 1, 16, 8, 128, 2048, "qwen3", tie_word_embeddings=True),
    "1536": shape(151936, 1536, 8960, 1, 12, 2, 128, 2048, "qwen2", tie_word_embeddings=True),
    "2048": shape(32000, 2048, 5632, 1, 32, 4, 64, 2048),
    "4096": shape(32000, 4096, 14336, 1, 32, 8, 128, 2048),
    # Gemma's layers, one of each kind.
    "gemma2": shape(8192, 640, 1280, 2, 4, 2, 64, 2048, "gemma2", **GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=9.0),
    "gemma3": shape(8192, 640, 1280, 2, 4, 1, 64, 2048, "gemma3_text", **GEMMA, query_pre_attn_scalar=100),
    # Layer norms, parallel parts, neighbouring pairs, layers without positions; residuals that are scaled; a part of heads rotated.
    "cohere2": config_of(
        "cohere2", **WIDE, logit_scale=0.3, sliding_window=12, layer_types=["sliding_attention", "full_attention"]
    ),
    "cohere": config_of("cohere", **WIDE, use_qk_norm=True, attention_bias=True),
    "granite": config_of("granite", **WIDE, embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0),
    "glm4": config_of("glm4", **WIDE, head_dim=64),
    "olmo": config_of("olmo", **WIDE, clip_qkv=1.5),
    # Learned positions; norms of whole queries; sinks; an activation with parameters; queries that grow.
    "gpt2": config_of("gpt2", vocab_size=8192, n_embd=640, n_layer=2, n_head=10, n_positions=2048),
    "gpt_neox": config_of("gpt_neox", **{key: value for key, value in WIDE.items() if key != "num_key_value_heads"}),
    "olmo2": config_of("olmo2", **WIDE),
    "granite_swa": config_of("granite_swa", **WIDE, sliding_window=12, residual_multiplier=0.22, layer_rope_theta=[0, 1e4]),
    "apertus": config_of("apertus", **WIDE),
    "ministral3": config_of("ministral3", **WIDE, head_dim=64, rope_parameters=YARN | {"llama_4_scaling_beta": 0.1}),
    # An earlier layer's keys and values, values that are keys, an embedding by layer, experts beside an MLP; latents.
    "gemma4": config_of("gemma4_text", **GEMMA4),
    "deepseek_v3": config_of("deepseek_v3", **LATENT, num_experts_per_tok=3, rope_parameters=YARN | {"mscale_all_dim": 1.3}),
    # Experts, also with biases and a bounded activation, and a shared one.
    "qwen3_moe": config_of("qwen3_moe", **WIDE, head_dim=64, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=384),
    "gpt_oss": config_of("gpt_oss", **WIDE, head_dim=64, num_local_experts=8, num_experts_per_tok=3, rope_parameters=YARN),
    "glm4_moe": config_of("glm4_moe", **WIDE, head_dim=64, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=384),
}
QUICK = {("576", "bfloat16")}
OF_KINDS = ("gemma2", "cohere2", "granite", "apertus", "qwen3_moe", "gpt_oss", "glm4_moe", "gemma4", "deepseek_v3")
LONG = {("576", "float32")} | {(name, "bfloat16") for name in OF_KINDS}
# Batch and window, and the buckets of their buffers.
PROGRAMS = ((1, 1, 256), (1, 6, 256), (2, 1, 512), (4, 16, 256), (8, 8, 256))

CASES = [
    pytest.param(
        name,
        dtype,
        marks=[] if (name, dtype) in QUICK else [pytest.mark.slow] if (name, dtype) in LONG else [pytest.mark.exhaustive],
        id=f"{name}-{dtype}",
    )
    for name in SHAPES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_whole_models(name, dtype):
    """Logits of every position, in every program, are those of the widest."""
    network = Network(SHAPES[name])
    params = {
        leaf: (jax.random.normal(jax.random.key(i), t.shape) / (1, *t.shape)[-1] ** 0.5 + float(len(t.shape) == 1)).astype(dtype)
        for i, (leaf, t) in enumerate(network.tensors().items())
    }
    tokens = np.random.RandomState(0).randint(0, network.vocab_size, (8, 36)).astype(np.int32)
    fed = 20

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(params, tokens, window, slots):
        cache = network.init_cache(params, len(tokens), slots)
        start = jnp.zeros((len(tokens),), jnp.int32)
        _, cache, _ = network(params, tokens[:, :fed], start, cache)
        return network(params, tokens[:, fed : fed + max(window, FEWEST)], start + fed, cache)[0][:, :window]

    expected = np.asarray(run(params, tokens, 16, 256))
    for batch, window, slots in PROGRAMS:
        if slots != 256 and not IN_CPP:
            continue
        found = np.asarray(run(params, tokens[:batch], window, slots))
        np.testing.assert_array_equal(found, expected[:batch, :window], err_msg=f"{batch} x {window} in {slots}")
