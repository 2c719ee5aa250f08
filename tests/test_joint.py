"""Law 5 under both rules, as a distribution: joint sequences of all stacks against their exact probabilities.

Four new tokens over an alphabet of three, after prompts of several lengths in one ragged batch: every outcome of every prompt is
counted, and its exact probability is known by enumeration. Ways to get the rule wrong that only a distribution shows are tried at
the end, and seen.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Markov, chain, count_sequences, filtered_oracle, g_test, ragged, softmax

from mlspecqd_jax import levels
from mlspecqd_jax.levels import SLACK
from mlspecqd_jax.sampling import Sampling
from mlspecqd_jax.speculation import generate_tokens
from mlspecqd_jax.verification import verify

V, NEW = 3, 4
PROMPTS = [[1], [2, 0], [0, 1, 2, 0, 1]]
ROWS = 201_000
model = Markov(V)
TABLES = [model.table(seed, scale=1.5) for seed in (10, 11, 12, 13)]

CHAINS = {
    "": (),
    "own": (2,),
    "shared": (2,),
    "own>own": (3, 2),
    "shared>own": (3, 2),
    "own>shared": (3, 1),
    "shared>ngram": (3, 2),
}
DEEP = {"own>shared>own": (3, 2, 1), "shared>own>ngram": (3, 2, 2), "own>own>shared": (4, 2, 1)}
FILTERS = {
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 1.3, "top_k": 2},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.35},
    "all": {"temperature": 1.2, "top_k": 2, "top_p": 0.85, "min_p": 0.2},
}
CASES = [(name, rule, kind) for name in CHAINS for rule in ("rejection", "coupled") for kind in FILTERS]
CHEAP = [("own>own", "rejection", "temperature"), ("shared>ngram", "rejection", "all"), ("shared>own", "coupled", "top_p")]
P_VALUE = 1e-3 / len(CASES)
jit = jax.jit(generate_tokens)


def arguments(name, rule, settings):
    tables = [table for table, level in zip(TABLES, ["target", *name.split(">")], strict=False) if level not in ("ngram", "")]
    stack = chain(name, tables, CHAINS[name], model)
    size = SLACK + NEW + max(map(len, PROMPTS))
    tokens, length = (jnp.repeat(x, ROWS // len(PROMPTS), axis=0) for x in ragged(PROMPTS, size))
    return stack, tokens, length, length + NEW, Sampling.create(ROWS, V, rule=rule, seed=0, **settings)


def exact(settings):
    """Return the probability of each continuation of each prompt, [prompts, V ** NEW]."""
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
    """Return how often each continuation of each prompt came out, [prompts, V ** NEW]."""
    begin = np.repeat([len(prompt) for prompt in PROMPTS], ROWS // len(PROMPTS))
    assert np.array_equal(length, begin + NEW)
    new = np.take_along_axis(np.asarray(tokens), begin[:, None] + np.arange(NEW), axis=1)
    return np.stack([count_sequences(part, V) for part in np.split(new, len(PROMPTS))])


@pytest.mark.parametrize(
    ("name", "rule", "kind"), [pytest.param(*case, marks=[] if case in CHEAP else [pytest.mark.slow]) for case in CASES]
)
def test_joint_sequences_follow_the_target(name, rule, kind):
    """Law 5: whatever drafts, at any depth and under any filter."""
    tokens, length, state = jit(*arguments(name, rule, FILTERS[kind]))
    expected = exact(FILTERS[kind])
    assert g_test(counted(tokens, length), expected) > P_VALUE
    if name:
        judged, accepted = (getattr(state.counts, field).sum() for field in ("judged", "accepted"))
        assert 0.2 * judged < accepted < 0.95 * judged
    bent = expected**1.05
    assert g_test(counted(tokens, length), bent) < 1e-6  # a little more certainty would show


# Mutations: what `verify` returns, or is given, with one thing wrong.


def redrawn_from_all(logits, draft, position, sampling, level=0):
    """Redraw from p instead of the residual: judge again with nothing drafted beyond what was accepted."""
    verdict = verify(logits, draft, position, sampling, level)
    return verify(logits, draft._replace(length=verdict.accepted), position, sampling, level)


def from_below_handed_up(logits, draft, position, sampling, level=0):
    """Hand up the probabilities of the level below, for the tokens accepted from it, instead of one's own."""
    verdict = verify(logits, draft, position, sampling, level)
    kept = jnp.arange(draft.tokens.shape[1]) < verdict.accepted[:, None]
    theirs = jnp.where(kept[..., None], draft.probs, verdict.probs[:, :-1])
    return verdict._replace(probs=jnp.concatenate([theirs, verdict.probs[:, -1:]], axis=1))


def bonus_from_the_draft(logits, draft, position, sampling, level=0):
    """Draw the bonus token of a full draft from the drafter's model, at its own prefix, instead of the target's."""
    if level == 0:
        context = 1 + draft.tokens[:, -1] + (V + 1) * (1 + draft.tokens[:, -2])
        full = jnp.arange(logits.shape[1]) == jnp.where(draft.length == draft.tokens.shape[1], draft.length, -1)[:, None]
        logits = jnp.where(full[..., None], TABLES[1][context][:, None], logits)
    return verify(logits, draft, position, sampling, level)


MUTATIONS = [
    pytest.param("own", redrawn_from_all),
    pytest.param("own", bonus_from_the_draft),
    pytest.param("own>own", from_below_handed_up),
    pytest.param("own>own", redrawn_from_all, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "mutated"), MUTATIONS)
def test_a_wrong_rule_is_seen(monkeypatch, name, mutated):
    """The same test, and how far a mutation is from passing it."""
    monkeypatch.setattr(levels, "verify", mutated)
    settings = FILTERS["temperature"]
    tokens, length, _ = jax.jit(lambda *args: generate_tokens(*args))(*arguments(name, "rejection", settings))  # traced anew
    assert g_test(counted(tokens, length), exact(settings)) < 1e-6
