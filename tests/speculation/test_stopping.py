"""Law 5 where drafts end early: which rules keep the target's distribution, and that the two that do not are seen.

Under rejection a draft may end by anything that was known before its next token was drawn, and be as long as anything of earlier
rounds says, since each round has noise of its own; no token may be dropped for what it is. Coupled and greedy texts depend on no
draft at all.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from joint import LONG, SHORT, TABLES, counted, model, p_values, prompts_of
from toys import quick_jit

from mlspecqd_jax.speculation.autopilot import Autopilot
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.drafters.either import Either
from mlspecqd_jax.speculation.guide import CLASSES
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.loop import generate_tokens
from mlspecqd_jax.speculation.settings import Sampling

LEAST = 1e-4
slow = pytest.mark.slow


def after(draft):
    """End behind the first token that was unlikely."""
    return 1 + _leading(_own(draft) > 0.3)


def before(draft):
    """End before a token whose likeliest value is unlikely."""
    return _leading(jnp.max(draft.probs, axis=-1) > 0.55)


def dropping(draft):
    """Drop the first token that was unlikely, and what follows it."""
    return _leading(_own(draft) > 0.3)


def _own(draft):
    return jnp.take_along_axis(draft.probs, draft.tokens[..., None], axis=-1)[..., 0]


def _leading(holds):
    return jnp.sum(jnp.cumprod(holds.astype(jnp.int32), axis=1), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ending:
    """A `Drafter`: a level's drafts, ended by a rule."""

    level: Level
    rule: Any = dataclasses.field(metadata={"static": True})
    name, must_follow, uses_features = "ending", False, False

    def init(self, batch, slots):
        return self.level.init(batch, slots)

    def feed(self, state, tokens, start, lent):
        return self.level.feed(state, tokens, start, lent)

    def propose(self, state, ask, sampling):
        draft, state, lent = self.level.propose(state, ask, sampling)
        if draft.probs is None:  # coupled: by what the tokens are
            return draft._replace(length=jnp.minimum(draft.length, _leading(draft.tokens != 1))), state, lent
        return draft._replace(length=jnp.minimum(draft.length, self.rule(draft))), state, lent


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Superstitious:
    """A `Drafter` that drafts nothing at a place for which it drafted token 0 in an earlier round, which was not accepted."""

    level: Level
    name, must_follow, uses_features = "superstitious", False, False

    def init(self, batch, slots):
        return self.level.init(batch, slots), jnp.zeros((batch, slots), jnp.int32) - 1

    def feed(self, state, tokens, start, lent):
        return self.level.feed(state[0], tokens, start, lent), state[1]

    def propose(self, state, ask, sampling):
        here = jnp.take_along_axis(state[1], ask.sequences.length[:, None], axis=1)[:, 0]
        ask = ask._replace(wanted=jnp.where(here == 0, 0, ask.wanted))
        draft, below, lent = self.level.propose(state[0], ask, sampling)
        at = ask.sequences.length[:, None] + jnp.arange(ask.draft_len)[None, :]
        drafted = jnp.where(jnp.arange(ask.draft_len)[None, :] < draft.length[:, None], draft.tokens, -1)
        row = jnp.arange(len(at))[:, None]
        return draft, (below, state[1].at[row, at].set(drafted, mode="drop")), lent


def p_value(drafter, rule, compiled=None, batch=SHORT):
    stack = Level(model, TABLES[0], drafter, 3)
    tokens, length, state = (compiled or quick_jit(generate_tokens))(stack, *prompts_of(rule, batch))
    drafted = np.asarray(state.counts.drafted) / np.maximum(np.asarray(state.counts.rounds), 1)
    assert 0.2 < drafted.mean() < 2.4  # it ends early, now and then
    return p_values(counted(tokens, length))[0]


twin = Level(model, TABLES[1])


@pytest.mark.parametrize(
    ("drafter", "rule"),
    [
        pytest.param(Ending(twin, after), "rejection", id="after", marks=slow),
        pytest.param(Ending(twin, before), "rejection", id="before", marks=slow),
        pytest.param(Superstitious(twin), "rejection", id="by what was discarded", marks=slow),
        pytest.param(Ending(twin, dropping), "coupled", id="dropping, coupled", marks=slow),
    ],
)
def test_drafts_may_end_by_what_was_known(drafter, rule):
    """Law 5."""
    assert p_value(drafter, rule) > LEAST


@slow
def test_a_token_dropped_for_what_it_is_would_be_seen():
    assert p_value(Ending(twin, dropping), "rejection") < 1e-6


@slow
def test_noise_that_two_rounds_share_would_be_seen(monkeypatch):
    """If a place had one noise for all rounds, what was discarded there would tell of what is to be drawn."""
    monkeypatch.setattr(Sampling, "of_round", lambda self, length: self)
    traced_anew = quick_jit(lambda *given: generate_tokens(*given))
    assert p_value(Superstitious(twin), "rejection", traced_anew, 2 * LONG) < 1e-6


@slow
def test_the_autopilot_keeps_the_distribution():
    """Law 5: rows by themselves, each learning quickly from all that happens, discarded or not, at two levels."""
    inner = Level(model, TABLES[1], Either(Level(model, TABLES[2])), 2)
    stack = Level(model, TABLES[0], Either(inner), 3)
    times = jnp.asarray(np.array([[1], [0.2], [0.02]]) * (1 + 0.02 * np.arange(SLACK + 1)), jnp.float32)
    prior = jnp.asarray(np.broadcast_to([0.03, 0.05], (3, 2, CLASSES, 2)), jnp.float32)
    control = Autopilot.create(times, prior, 2, rate=1.2)

    @quick_jit
    def run(tokens, length, limit, sampling):
        def one(tokens, length, limit, settings):
            alone = dataclasses.replace(sampling, **{name: x[None] for name, x in settings.items()})
            out, length, state = generate_tokens(stack, tokens[None], length[None], limit[None], alone, control=control)
            return out[0], length[0], state.counts.drafted[0]

        rows = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(sampling)}
        rows = {name: x for name, x in rows.items() if getattr(x, "shape", ())[:1] == length.shape}
        return jax.vmap(one)(tokens, length, limit, rows)

    tokens, length, drafted = run(*prompts_of("rejection", SHORT))
    assert len(np.unique(drafted)) > 3  # rows differ in what they drafted
    assert p_values(counted(tokens, length))[0] > LEAST
