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
from frequencies import count_sequences, g_test
from oracles import filtered_oracle, softmax
from toys import Markov, chain, level_counts, quick_jit, ragged

from mlspecqd_jax.speculation import judging
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.loop import generate_tokens
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.verification import verify

V, NEW = 3, 4
PROMPTS = [[1], [2, 0], [0, 1, 2, 0, 1]]
model = Markov(V)
TABLES = [model.table(seed, scale=1.5) for seed in (10, 11, 12, 13)]

CHAINS = {
    "": (),
    "shared": (2,),
    "shared>shared": (3, 2),
    "shared>own": (3, 2),
    "own>shared>own": (3, 2, 1),
    "shared>own>ngram": (3, 2, 2),
}
FILTERS = [
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 2},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.35},
    {"temperature": 1.2, "top_k": 2, "top_p": 0.85, "min_p": 0.2},
]
GROUPS = [(prompt, settings) for settings in FILTERS for prompt in PROMPTS]  # each the same share of a batch
SHORT, LONG = (rows // len(GROUPS) * len(GROUPS) for rows in (30_000, 105_000))
BATCHES = 2 * len(FILTERS)  # of LONG rows, of which each filter has its share
# Depths 1 to 4. Under the coupled rule the output is that of plain decoding, whatever drafts, so two stacks are enough.
LENGTHY = [("", "rejection"), ("own>shared>own", "rejection")]
MORE = [
    ("own>shared>own", "coupled"),
    ("shared", "rejection"),
    ("shared>own", "rejection"),
    ("shared>own>ngram", "rejection"),
    ("", "coupled"),
]
P_VALUE = 1e-3 / (len(LENGTHY + MORE) * len(FILTERS))


def arguments(name, rule, batch, seed=0):
    tables = [table for table, level in zip(TABLES, ["target", *name.split(">")], strict=False) if level not in ("ngram", "")]
    stack = chain(name, tables, CHAINS[name], model)
    share = batch // len(GROUPS)
    tokens, length = ragged([prompt for prompt, _ in GROUPS], SLACK + NEW + max(map(len, PROMPTS)))
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    settings = {key: np.repeat([(off | given)[key] for _, given in GROUPS], share) for key in ("temperature", *off)}
    tokens, length = (jnp.repeat(x, share, axis=0) for x in (tokens, length))
    return stack, tokens, length, length + NEW, Sampling.create(batch, V, rule=rule, seed=seed, **settings)


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


def check(compiled, name, rule, batch, batches=1):
    observed = 0
    for i in range(batches):
        tokens, length, state = compiled(*arguments(name, rule, batch, seed=i * batch))
        observed = observed + counted(tokens, length)
    follows, bent = p_values(observed)
    assert follows > P_VALUE
    assert bent < 1e-6  # the test would see it
    for counts in level_counts(state)[: len(CHAINS[name])]:
        judged, accepted = counts.judged.sum(), counts.accepted.sum()
        assert 0.05 * judged < accepted < 0.95 * judged


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared>shared"])
def test_joint_sequences_follow_the_target(name):
    """Law 5."""
    check(quick_jit(generate_tokens), name, "rejection", SHORT)


@pytest.mark.parametrize(
    ("name", "rule"),
    [pytest.param(*case, marks=pytest.mark.slow if case in LENGTHY else pytest.mark.exhaustive) for case in LENGTHY + MORE],
)
def test_joint_sequences_follow_the_target_at_length(name, rule):
    """Law 5: whatever drafts, at any depth and under any filter."""
    check(jax.jit(generate_tokens), name, rule, LONG)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "rule"), LENGTHY + MORE)
def test_joint_sequences_follow_the_target_at_more_length(name, rule):
    """Law 5, with more rows; under the rejection rule, where drafts change what is drawn, each filter has twice a batch."""
    check(jax.jit(generate_tokens), name, rule, LONG, BATCHES if rule == "rejection" else 2)


# Mutations: what `verify` returns, or is given, with one thing wrong.


def redrawn_from_all(logits, draft, position, sampling, level=0, leads=False):
    """Redraw from p instead of the residual: judge again with nothing drafted beyond what was accepted."""
    verdict = verify(logits, draft, position, sampling, level)
    return verify(logits, draft._replace(length=verdict.accepted), position, sampling, level)


def from_below_handed_up(logits, draft, position, sampling, level=0, leads=False):
    """Hand up the probabilities of the level below, for the tokens accepted from it, instead of one's own."""
    verdict = verify(logits, draft, position, sampling, level)
    kept = jnp.arange(draft.tokens.shape[1])[None, :] < verdict.accepted[:, None]
    theirs = jnp.where(kept[..., None], draft.probs, verdict.probs[:, :-1])
    return verdict._replace(probs=jnp.concatenate([theirs, verdict.probs[:, -1:]], axis=1))


def bonus_from_the_draft(logits, draft, position, sampling, level=0, leads=False):
    """Draw the bonus token of a full draft from the drafter's model, at its own prefix, instead of the target's."""
    if level == 0:
        context = 1 + draft.tokens[:, -1] + (V + 1) * (1 + draft.tokens[:, -2])
        full = jnp.arange(logits.shape[1])[None, :] == jnp.where(draft.length == draft.tokens.shape[1], draft.length, -1)[:, None]
        logits = jnp.where(full[..., None], TABLES[1][context][:, None], logits)
    return verify(logits, draft, position, sampling, level)


@pytest.mark.parametrize(
    ("name", "mutated"),
    [
        pytest.param("shared", redrawn_from_all, marks=pytest.mark.slow),  # test_verification.py sees it too
        pytest.param("shared", bonus_from_the_draft, marks=pytest.mark.slow),
        pytest.param("shared>shared", from_below_handed_up, marks=pytest.mark.slow),
    ],
)
def test_a_wrong_rule_is_seen(monkeypatch, name, mutated):
    """The same test, and how far a mutation is from passing it."""
    monkeypatch.setattr(judging, "verify", mutated)
    traced_anew = quick_jit(lambda *given: generate_tokens(*given))
    assert p_values(counted(*traced_anew(*arguments(name, "rejection", SHORT))[:2]))[0] < 1e-6
