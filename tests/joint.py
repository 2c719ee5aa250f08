"""Joint sequences of a few tokens over a small alphabet, and their exact probabilities.

Four new tokens over an alphabet of three, after prompts of several lengths in one ragged batch: every outcome of every prompt is
counted, and its exact probability is known by enumeration.
"""

import itertools

import jax.numpy as jnp
import numpy as np
from frequencies import count_sequences, g_test
from oracles import filtered_oracle, softmax
from toys import Markov, ragged

from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.settings import Sampling

V, NEW = 3, 4
PROMPTS = [[1], [2, 0], [0, 1, 2, 0, 1]]
model = Markov(V)
TABLES = [model.table(seed, scale=1.5) for seed in (10, 11, 12, 13)]

FILTERS = [
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 2},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.35},
    {"temperature": 1.2, "top_k": 2, "top_p": 0.85, "min_p": 0.2},
]
GROUPS = [(prompt, settings) for settings in FILTERS for prompt in PROMPTS]  # each the same share of a batch
SHORT, LONG = (rows // len(GROUPS) * len(GROUPS) for rows in (30_000, 105_000))


def prompts_of(rule, batch, seed=0):
    """Return what to generate from, as `generate_tokens` takes it: tokens, length, limit, sampling, every group's share of rows."""
    share = batch // len(GROUPS)
    tokens, length = ragged([prompt for prompt, _ in GROUPS], SLACK + NEW + max(map(len, PROMPTS)))
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    settings = {key: np.repeat([(off | given)[key] for _, given in GROUPS], share) for key in ("temperature", *off)}
    tokens, length = (jnp.repeat(x, share, axis=0) for x in (tokens, length))
    return tokens, length, length + NEW, Sampling.create(batch, V, rule=rule, seed=seed, **settings)


def exact(settings):
    """Return the probability of each prompt and its continuation, [prompts, V ** NEW]."""
    expected = []
    for prompt in PROMPTS:
        probs = {(): 1.0}
        for _ in range(NEW):
            longer = {}
            for so_far, p in probs.items():
                kept, doubtful = filtered_oracle(model.truth(TABLES[0], prompt + list(so_far)), **settings)
                assert not doubtful
                longer |= {(*so_far, token): p * given for token, given in enumerate(softmax(kept))}
            probs = longer
        expected.append([probs[key] for key in itertools.product(range(V), repeat=NEW)])
    return np.array(expected) / len(PROMPTS)


def counted(tokens, length):
    """Count the rows by filter, prompt and outcome."""
    begin = np.repeat([len(prompt) for prompt, _ in GROUPS], len(length) // len(GROUPS))
    assert np.array_equal(length, begin + NEW)
    new = np.take_along_axis(np.asarray(tokens), begin[:, None] + np.arange(NEW), axis=1)
    counts = np.stack([count_sequences(part, V) for part in np.split(new, len(GROUPS))])
    return counts.reshape(len(FILTERS), len(PROMPTS), -1)


def p_values(observed):
    """Return how well counts follow the target's joint distribution, and one a little more certain, at the worst of the filters."""
    expected = [exact(settings) for settings in FILTERS]
    return tuple(min(g_test(o, e**power) for o, e in zip(observed, expected, strict=True)) for power in (1, 1.1))
