"""Caches that do not hold all positions in the compiled loop: neither states nor rings are copied (law 8), whatever drafts."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import loop_lines, operations
from tiny import shape

from mlspecqd_jax import generation, requests, stacks
from mlspecqd_jax.loading import models
from mlspecqd_jax.network.config import DeltaNet, Norm, ShortConv
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.speculation import loop
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.text.card import Card

PROMPT = [3, 1, 4, 1, 5]


def model_of_all_kinds():
    """A random model in bfloat16 with a delta net, a short convolution and attention, of sizes that no activation shares."""
    config = shape(97, 44, 88, 3, 6, 3, 12, 512)
    mixers = (DeltaNet(2, 6, 20, 12, 4, Norm()), ShortConv(5), config.layers[2].mixer)
    layers = tuple(dataclasses.replace(layer, mixer=mixer) for layer, mixer in zip(config.layers, mixers, strict=True))
    network, rng = Network(dataclasses.replace(config, layers=layers)), np.random.default_rng(0)
    tensors = network.tensors().items()
    params = {name: jnp.asarray(0.1 * rng.normal(size=t.shape), t.dtype or jnp.bfloat16) for name, t in tensors}
    return models.Model(network, params, Card("all", 97, 512, None, (5,)), pathlib.Path())


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("feed", marks=pytest.mark.exhaustive), "advance"])
def test_no_state_and_no_ring_is_copied(name):
    models.enable_compilation_cache()
    target = model_of_all_kinds()
    stack = stacks.stack(target, (target.quantized(), 5), (target.quantized("mxfp8_e4m3"), 2))
    batch = requests.prepare(stack, [PROMPT], max_new_tokens=20)
    given = batch.tokens, batch.length, Sampling.create(1, 97)
    state = jax.eval_shape(lambda *arguments: loop.init(*arguments, prefill_width=16), stack, *given)
    programs = generation.programs(stack)
    if name == "feed":
        lowered = programs.feed.lower(stack, state, prefill_width=16, first=np.int32(0), pieces=np.int32(1))
    else:
        lowered = programs.advance.lower(stack, state, batch.limit, given[2], np.int32(1))
    kept = {tuple(n for n in leaf.shape if n != 1) for leaf in jax.tree.leaves(state.cache[:2]) if leaf.ndim > 1}
    assert {(2, 20, 36), (7, 2, 20), (7, 2, 36), (7, 2, 3), (10, 152), (11, 44)} == kept
    found = list(operations(loop_lines(lowered.compile().as_text())))
    assert [operation for operation in found if operation[0] in ("copy", "copy-start") and operation[2] in kept] == []
    assert (2, 20, 36) in [operation[2] for operation in found]  # the state is there, and is made anew by steps
