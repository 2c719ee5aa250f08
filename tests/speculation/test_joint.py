"""Law 5 under both rules, as a distribution: joint sequences of all stacks against their exact probabilities.

Ways to get the rule wrong that only a distribution shows are tried at the end, and seen.
"""

import jax
import jax.numpy as jnp
import pytest
from joint import FILTERS, LONG, SHORT, TABLES, V, counted, model, p_values, prompts_of
from toys import chain, level_counts, quick_jit

from mlspecqd_jax.speculation import judging
from mlspecqd_jax.speculation.loop import generate_tokens
from mlspecqd_jax.speculation.verification import verify

CHAINS = {
    "": (),
    "shared": (2,),
    "shared>shared": (3, 2),
    "shared>own": (3, 2),
    "own>shared>own": (3, 2, 1),
    "shared>own>ngram": (3, 2, 2),
}
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
    return chain(name, tables, CHAINS[name], model), *prompts_of(rule, batch, seed)


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


def redrawn_from_all(logits, draft, position, sampling, level=0, *how):
    """Redraw from p instead of the residual: judge again with nothing drafted beyond what was accepted."""
    verdict = verify(logits, draft, position, sampling, level)
    return verify(logits, draft._replace(length=verdict.accepted), position, sampling, level)


def from_below_handed_up(logits, draft, position, sampling, level=0, *how):
    """Hand up the probabilities of the level below, for the tokens accepted from it, instead of one's own."""
    verdict = verify(logits, draft, position, sampling, level)
    kept = jnp.arange(draft.tokens.shape[1])[None, :] < verdict.accepted[:, None]
    theirs = jnp.where(kept[..., None], draft.probs, verdict.probs[:, :-1])
    return verdict._replace(probs=jnp.concatenate([theirs, verdict.probs[:, -1:]], axis=1))


def bonus_from_the_draft(logits, draft, position, sampling, level=0, *how):
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
