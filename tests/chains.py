"""The stacks, requests and drafts on which the laws of the recursion are tested; few structures, so that little is compiled."""

import jax.numpy as jnp
import numpy as np
from toys import SharedToy, Toy, chain, level_counts, logprob_rows, ragged, rows, run

from mlspecqd_jax.speculation.settings import Sampling

V, S, B = 8, 128, 16
toy = Toy(V)
table = toy.table(0)
shared_toy = SharedToy(toy)
plain = chain("", [table], [], shared_toy)

# What is below the target, and the draft_lens.
CHAINS = {
    "own": (4,),
    "shared": (4,),
    "shared>shared": (6, 2),
    "own>own": (6, 2),
    "own>shared": (5, 2),
    "shared>own": (6, 2),
    "shared>ngram": (6, 3),
    "own>shared>own": (8, 3, 1),
}

LENGTHS = [1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 11, 14, 16, 18, 21, 24]
PROMPTS = [np.random.default_rng(n + 40 * r).integers(V - 1, size=n).tolist() for r, n in enumerate(LENGTHS)]

GREEDY = {}
MIXED = {
    "temperature": np.resize([0, 0.7, 1, 1.5, 1], B),
    "top_k": np.resize([0, 0, 4, 0], B),
    "top_p": np.resize([1, 0.9, 1], B),
    "min_p": np.resize([0, 0, 0, 0, 0, 0.1], B),
    "repetition_penalty": np.resize([1, 1, 1.2, 1, 1, 1, 0.9], B),
    "presence_penalty": np.resize([0, 0.5], B),
    "frequency_penalty": np.resize([0, 0, 0.3], B),
    "logit_bias": [{r % 7: 1.5, (r + 1) % 7: -np.inf} if r % 3 == 0 else {} for r in range(B)],
}


def with_models(name):
    """Return how many levels of a chain have a model, the target included."""
    return 1 + len([n for n in name.split(">") if n != "ngram"])


def stack_of(name, tables=None):
    """Return a chain with the target's table in all of its levels, or with others below."""
    below = [table] * (with_models(name) - 1) if tables is None else tables
    return chain(name, [table, *below], CHAINS[name], shared_toy)


def sampling_of(batch=B, **settings):
    """Return settings of one structure: all programs of a stack are one."""
    return Sampling.create(batch, V, logprobs=True, **{"logit_bias": [{0: 0.0}] * batch} | settings)


def generate(stack, limits, sampling, prompts=PROMPTS):
    """Return (rows, state) of prompts laid out with alarms beyond them."""
    tokens, length, state = run(stack, *ragged(prompts, S, toy.alarm), jnp.asarray(limits, jnp.int32), sampling)
    return rows(tokens, length), state


def limits_of(new=20, prompts=PROMPTS):
    """Return limits that end the rows at every offset within a block."""
    return [len(prompt) + new + r % 9 for r, prompt in enumerate(prompts)]


def assert_equal_to_plain(stack, limits, sampling, prompts=PROMPTS, exact_rows=slice(None)):
    """Assert that tokens, ends and log-probabilities are those of plain decoding; return the stack's state."""
    ours, state = generate(stack, limits, sampling, prompts)
    truth, plain_state = generate(plain, limits, sampling, prompts)
    assert ours[exact_rows] == truth[exact_rows]
    assert np.array_equal(state.ended[exact_rows], plain_state.ended[exact_rows])
    for ours, theirs in zip(logprob_rows(state)[exact_rows], logprob_rows(plain_state)[exact_rows], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    new = np.asarray(state.length - state.begin)
    assert np.all(state.counts.rounds <= new)  # never under one token a round
    assert state.counts.passes == state.counts.rounds.max()
    return state


def near(seed):
    """Return a table that often agrees with the target's."""
    return 0.8 * table + 0.2 * toy.table(seed)


def counts_of_rows(state, index):
    return [[np.asarray(x)[index].tolist() for x in counts[:4]] for counts in level_counts(state)]
