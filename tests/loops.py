"""Requests of six rows to the loop on one toy, and drafts of every quality for them."""

import jax.numpy as jnp
import numpy as np
from toys import Script, Toy, level, quick_jit, ragged, rows, run

from mlspecqd_jax.speculation.loop import advance, init, step
from mlspecqd_jax.speculation.settings import Sampling

V, G, S = 8, 4, 128
PROMPTS = [[3], [1, 2], [0, 0, 5], [6, 5, 4, 3, 2], [2] * 9, [1, 3, 5] * 6]
B = len(PROMPTS)

toy = Toy(V)
table, other_table = toy.table(0), toy.table(1)
jit_init = quick_jit(init, static_argnames="prefill_width")
jit_step = quick_jit(step)
jit_advance = quick_jit(advance)

GREEDY = {}
MIXED = {
    "temperature": [0, 0.7, 1, 1.5, 0, 1],
    "top_k": [0, 0, 3, 0, 2, 0],
    "top_p": [1, 1, 1, 0.8, 1, 0.9],
    "min_p": [0, 0.1, 0, 0, 0, 0],
}
PENALIZED = {"presence_penalty": 0.5, "frequency_penalty": [0, 0.3, 0, 0.2, 0, 0.1], "repetition_penalty": [1, 1.2, 1, 1, 0.9, 1]}


def sampling_of(batch=B, **arguments):
    return Sampling.create(batch, V, logprobs=True, **arguments)


def prompts_of(prompts=PROMPTS, size=S):
    """Lay prompts out with alarms beyond them: whoever looks there is heard."""
    return ragged(prompts, size, filler=toy.alarm)


def generate(stack, limits, sampling, prompts=PROMPTS):
    tokens, length, state = run(stack, *prompts_of(prompts), jnp.asarray(limits, jnp.int32), sampling)
    return rows(tokens, length), state


plain = level(toy, table)


def script(truth, kind, draft_length=G):
    """Draft what plain decoding gives (perfect), never that (wrong), or anything (random)."""
    perfect = np.asarray(prompts_of(truth)[0])
    tokens = {
        "perfect": perfect,
        "wrong": (perfect + 1) % V,
        "random": np.random.default_rng(0).integers(V, size=perfect.shape),
        "mostly": np.where(np.random.default_rng(1).random(perfect.shape) < 0.7, perfect, (perfect + 1) % V),
    }[kind]
    return Script(jnp.asarray(tokens, jnp.int32), jnp.broadcast_to(jnp.asarray(draft_length, jnp.int32), (len(truth),)), V)
