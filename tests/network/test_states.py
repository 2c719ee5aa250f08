"""Layers whose caches do not hold all positions: whatever windows a text was fed in, and fed again, they leave the same (C15)."""

import functools

import family_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from recorded import error

import cpu_kernels
import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import config_file, huggingface
from mlspecqd_jax.network.families import config_of
from mlspecqd_jax.network.network import Network

B, T, REACH = 3, 40, 9
WIDTHS = (1, 7, 3, 20)


def apply(network, params, tokens, start, cache):
    return network(params, tokens, start, cache)[:2]


def walk(run, network, params, tokens, seed=0):
    """Yield (row, position, logits [V]) of a text fed in windows of all WIDTHS to rows at different positions.

    Each window may begin up to REACH positions before the end of what a row was fed, and may hold fewer tokens than it is wide.
    Every other one may be an outermost network's, before which none begins later.
    """
    settled = np.zeros(len(tokens), np.int64)
    random, rows = np.random.default_rng(seed), np.arange(len(tokens))[:, None]
    cache, end = network.init_cache(params, len(tokens), T + max(WIDTHS)), np.zeros(len(tokens), np.int64)
    for step in range(100):
        if end.min() == T:
            return
        width = WIDTHS[step % len(WIDTHS)]
        start = np.maximum(end - np.where(random.random(len(end)) < 0.5, 0, random.integers(0, REACH + 1, len(end))), settled)
        used = np.minimum(np.where(random.random(len(end)) < 0.5, width, random.integers(0, width + 1, len(end))), T - start)
        at = np.minimum(start[:, None] + np.arange(width)[None], T - 1)
        window = np.where(np.arange(width)[None] < used[:, None], tokens[rows, at], -1)
        here = network if network.outermost and step % 2 else network.of_a_draft
        settled = np.where((used > 0) & here.outermost, start, settled)
        logits, cache = run(here, params, window.astype(np.int32), start.astype(np.int32), cache)
        for r in range(len(end)):
            yield from ((r, start[r] + w, np.asarray(logits[r, w])) for w in range(used[r]))
        end = np.maximum(end, start + used)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("hybrids")
    return functools.cache(lambda family: family_files.write(root / family, family))


@pytest.mark.parametrize(
    ("family", "outermost"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in (("qwen3_5", True), ("qwen3_5", False), ("lfm2_wide", False))],
)
def test_windows_of_rows_at_different_positions(folder, family, outermost):
    """Against one pass without caches, in float32: windows that go back over several, prompts in pieces, padding."""
    network = Network(config_file.read_config(folder(family))).reaching(REACH, outermost)
    params = huggingface.read_params(folder(family), network, jnp.dtype("float32"), None)
    tokens = np.random.default_rng(1).integers(3, family_files.VOCAB, (B, T)).astype(np.int32)
    run = quick_jit(apply, static_argnums=0)
    whole, found = np.asarray(run(network, params, tokens, np.zeros(B, np.int32), None)[0]), np.zeros((B, T, family_files.VOCAB))
    for r, position, logits in walk(run, network, params, tokens):
        found[r, position] = logits
        assert error(logits, whole[r, position]) <= 1e-4, (r, position)
    assert error(found, whole) <= 2e-5


WIDE = {"vocab_size": 512, "hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 5}
WIDE |= {"num_key_value_heads": 1, "max_position_embeddings": 2048, "pad_token_id": 0}
SHAPES = {
    "lfm2": config_of("lfm2", **WIDE, full_attn_idxs=[1]),
    "qwen3_5": config_of(
        "qwen3_5_text",
        **WIDE,
        head_dim=64,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=64,
        linear_value_head_dim=40,
    ),
}


@pytest.mark.skipif(not cpu_kernels.isas("matmul"), reason="needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5", pytest.param("lfm2", marks=pytest.mark.exhaustive)])
def test_bits_do_not_depend_on_the_windows(name):
    """C7, in bfloat16: logits are those of single steps of one row alone, bit for bit, wherever windows were cut."""
    network = Network(SHAPES[name])
    params = {
        leaf: (jax.random.normal(jax.random.key(i), t.shape) / (1, *t.shape)[-1] ** 0.5 + float(len(t.shape) == 1)).astype(
            t.dtype or "bfloat16"
        )
        for i, (leaf, t) in enumerate(network.tensors().items())
    }
    tokens = np.random.default_rng(1).integers(0, network.vocab_size, (B, T)).astype(np.int32)
    run, expected = jax.jit(apply, static_argnums=0), np.zeros((B, T, network.vocab_size), np.float32)
    for r in range(B):
        cache = network.init_cache(params, 1, T)
        for t in range(T):
            logits, cache = run(network, params, tokens[r : r + 1, t : t + 1], np.array([t], np.int32), cache)
            expected[r, t] = logits[0, 0]
    seen = set()
    for r, position, logits in walk(run, network.reaching(REACH), params, tokens):
        np.testing.assert_array_equal(logits, expected[r, position], err_msg=f"row {r}, position {position}")
        seen.add((r, int(position)))
    assert len(seen) == B * T


def test_a_position_that_was_folded_is_not_fed_again(folder):
    """What lies further back than was asked for is no number, by which a row ends, and no other row's concern."""
    network = Network(config_file.read_config(folder("qwen3_5"))).reaching(2)
    params = huggingface.read_params(folder("qwen3_5"), network, jnp.dtype("float32"), None)
    tokens, run = np.full((3, 7), 5, np.int32), quick_jit(apply, static_argnums=0)
    _, cache = run(network, params, tokens, np.zeros(3, np.int32), network.init_cache(params, 3, T))
    for start, reached in (([5, 6, 7], [True] * 3), ([7, 4, 6], [True, False, True]), ([7, 7, 8], [True, True, False])):
        logits = np.asarray(run(network, params, tokens, np.array(start, np.int32), cache)[0])
        assert np.isfinite(logits).all(axis=(1, 2)).tolist() == reached
        assert np.isfinite(logits).any(axis=(1, 2)).tolist() == reached


OTHERS = [("qwen3_5", False), ("lfm2_wide", True), ("lfm2_wide", False)]


@pytest.mark.parametrize(
    ("family", "share"),
    [
        pytest.param("qwen3_5", True, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in OTHERS),
    ],
)
@pytest.mark.usefixtures("compiled_quickly")
def test_nested_drafts_change_no_token(folder, family, share):
    """Law 5, over prompts of different lengths: a twin, another that drafts for it, and look-up below, or the model itself."""
    model = mlsd.load(folder(family), dtype="float32")
    settings = {"max_new_tokens": 24, "stop_token_ids": [], "frequency_penalty": 0.5}
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7], [31, 41, 59]]
    plain = mlsd.generate(mlsd.stack(model), prompts, **settings)
    drafts = (model.quantized("mxfp8_e4m3"), 5), (model.quantized(), 2), (mlsd.prompt_lookup(), 2)
    nested = mlsd.generate(mlsd.stack(model, *drafts, share_cache=share), prompts, **settings)
    assert nested.tokens == plain.tokens
    assert nested.report["levels"][0]["accepted"] > 0
    same = mlsd.generate(mlsd.stack(model, (model, 6), (model, 2), share_cache=share), prompts, **settings)
    assert same.tokens == plain.tokens
    assert all(level["acceptance_rate"] == 1 for level in same.report["levels"][:2])  # law 4
