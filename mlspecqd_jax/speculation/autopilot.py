"""`Autopilot`: the control that learns what drafts are worth while it generates, and never loses more than it may.

After each round it reads the counts of all levels: passes by rows give the time that the round took by a table of costs, verdicts
by class the chances of acceptance. Both are forgotten bit by bit, the chances towards a prior.

The account: a round may take no more time than plain decoding would have taken for what the rows have by then, a little more, and
an allowance. So whatever is accepted or not, generating takes at most 1.004 times as long as plain decoding, and the allowance, in
the time of that table.

Notation: B batch, L levels, R rows of a window.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlspecqd_jax.arguments import LARGEST_INT
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.counts import Counts
from mlspecqd_jax.speculation.guide import MODEL, Guide, modelled

RATE = 1.3  # tokens in the time of a plain pass, of a stack of which nothing is known
LOSS = 1.004  # times plain decoding's time
ALLOWANCE, ALLOWANCE_OF_ALL = 2.0, 0.016  # passes of plain decoding for one row; for several, a part of all that they are asked for
FORGET_A_VERDICT, FORGET_A_TOKEN = 0.98, 0.995  # what remains of counts after each
FORGET_A_ROUND = 0.94  # of the rate at which tokens are made
FORGET_A_PACE = 0.9
# Asking in vain may take so much of the time, and so many plain passes at once; more only of what drafts have gained.
ASKING, ASKING_AT_ONCE = 0.01, 0.5
REST = 8  # plain rounds after asking has become too dear, until it may be cheap enough
FIRST_RETRY, LAST_RETRY = 16, 128  # rounds after which a model that seems not to pay drafts once more


class Learnt(NamedTuple):
    """What the autopilot knows, as it goes around with the rounds."""

    tables: jax.Array  # f32 [L, 2, B, 8, 2], accepted and judged by level, source and class: counts, and the prior in tokens
    made: jax.Array  # f32 [B, 2], tokens and time, of which the rate
    pace: jax.Array  # f32 [L, 3], rounds of each level, their time and their tokens
    done: jax.Array  # int32 [B], new tokens
    passed: jax.Array  # int32 [], rounds
    time: jax.Array  # f32 [], of all rounds
    least: jax.Array  # f32 [], the least that rounds were ever ahead of plain decoding; below 0 the allowance was drawn on
    credit: jax.Array  # f32 [], time that asking in vain may yet take without being held against drafts
    unheld: jax.Array  # f32 [], what it took so
    resting: jax.Array  # int32 [], plain rounds until a draft is asked for again; nothing is learnt before, however they are cut
    idle: jax.Array  # int32 [2], rounds since a model drafted for the target, and after how many it is to try
    last: tuple[Counts, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Autopilot:
    """A `Control` that drafts what pays by what it has learnt; all of it is traced, so that another table is no other program."""

    times: jax.Array  # f32 [L, SLACK + 1], of a pass of each level by rows in use, in those of plain decoding
    prior: jax.Array  # f32 [L, 2, 8, 2], accepted and judged by level, source and class, in tokens
    rate: jax.Array  # f32 [], tokens in the time of a plain pass, to begin with
    most: jax.Array  # int32 [D, B or 1], how many tokens each level may draft a round, outermost first
    allowance: jax.Array  # f32 [], times what is usual; infinity lifts the account
    asking: jax.Array  # f32 [], what a round takes beyond a plain one if a draft is asked for and there is none
    plain: jax.Array  # f32 [], seconds of a pass of plain decoding, of which nothing but reports knows; NaN where times are guessed

    @staticmethod
    def create(
        times,
        prior,
        drafters: int,
        *,
        rate: float = RATE,
        most: int = SLACK,
        allowance: float = 1.0,
        asking: float = 0.0,
        plain: float = float("nan"),
    ) -> "Autopilot":
        """Put together a control of a stack with so many `drafters`; see the fields."""
        caps = jax.device_put(np.full((drafters, 1), most, np.int32))
        times, prior, rate, allowance, asking, plain = (
            jax.device_put(np.float32(x)) for x in (times, prior, rate, allowance, asking, plain)
        )
        return Autopilot(times, prior, rate, caps, allowance, asking, plain)

    @property
    def is_measured(self) -> bool:
        """Whether the times are measured ones, by which seconds can be told; of a control that is there, not traced."""
        return math.isfinite(self.plain)

    def capped(self, draft_limit: jax.Array) -> "Autopilot":
        """Return the same for a batch, with at most so many tokens [B] a round for the target.

        The rows of a batch are in one pass together: times are those of so many windows, in passes of as many rows.
        """
        batch = len(draft_limit)
        times, most = np.asarray(self.times), np.asarray(self.most)  # by numpy: jax would compile each operation
        plain = times[0, min(batch, SLACK)]
        times = times[:, np.minimum(batch * np.arange(SLACK + 1), SLACK)] / plain
        most = np.broadcast_to(most, (len(most), batch)).copy()
        most[:1] = np.minimum(most[:1], np.asarray(draft_limit))
        asking, seconds = np.asarray(self.asking) / plain, np.asarray(self.plain) * plain
        times, asking, seconds, most = jax.device_put((times, asking, seconds, most))
        return dataclasses.replace(self, times=times, asking=asking, plain=seconds, most=most)

    def init(self, draft_lens, batch):
        """Return what is known before the first round (see `Control`)."""
        levels = len(self.times)
        tables = jnp.broadcast_to(self.prior[:, :, None], (levels, 2, batch, 8, 2)).astype(jnp.float32)
        # A level that has a drafter makes some 1.6 tokens in a pass over three rows.
        each = jnp.minimum(self.times[:, 1], self.times[:, 3] / 1.6)
        each = each.at[-1].set(jnp.where(len(draft_lens) < levels, self.times[-1, 1], each[-1]))
        counts = tuple(Counts.zeros(batch, n) for n in (*draft_lens, *(0,) * (levels - len(draft_lens))))
        return Learnt(
            tables=tables,
            made=jnp.broadcast_to(jnp.stack([12 * self.rate, jnp.float32(12)]), (batch, 2)),
            pace=jnp.stack([jnp.full_like(each, 4), 4 * each, jnp.full_like(each, 4)], axis=1),
            done=jnp.zeros((batch,), jnp.int32),
            passed=jnp.int32(0),
            time=jnp.float32(0),
            least=jnp.float32(jnp.inf),
            credit=jnp.float32(ASKING_AT_ONCE),
            unheld=jnp.float32(0),
            resting=jnp.where(self.asking <= ASKING_AT_ONCE, 0, REST).astype(jnp.int32),
            idle=jnp.asarray([0, FIRST_RETRY], jnp.int32),
            last=counts,
        )

    def limits(self, state):
        """Return the caps; the rest is the guide's (see `Control`)."""
        return jnp.broadcast_to(self.most, (len(self.most), *state.done.shape))

    def guide(self, state, left):
        """Return what the target's drafts are worth now (see `Control`)."""
        tables = state.tables
        accept = (tables[..., 0] + 0.3) / (tables[..., 1] + 0.6)
        mean = tables[..., 0].sum(-1) / tables[..., 1].sum(-1)
        # Rows go around together, so what counts is the row that has most left.
        weight = (left / jnp.maximum(jnp.max(left), 1)).astype(jnp.float32) ** 8
        weight = weight / jnp.maximum(weight.sum(), 1e-6)
        rate = jnp.sum(weight * jnp.maximum(state.made[:, 0] / state.made[:, 1], 1 / self.times[0, 1]))
        rows = jnp.minimum(1 + jnp.arange(SLACK + 1), SLACK)
        room = self._balance(state, left) + LOSS * self.times[0, 1]
        is_off = jnp.all(self.most[0] == 0) if len(self.most) else jnp.bool_(True)
        return Guide(
            times=self.times,
            accept=accept,
            mean=mean,
            pace=jnp.stack([state.pace[:, 2] / state.pace[:, 0], state.pace[:, 1] / state.pace[:, 0]], axis=1),
            weight=weight,
            worth=1 / rate,
            after=self.times[0, rows],
            room=room,
            retry=state.idle[0] >= state.idle[1],
            asks=state.resting == 0,
            rest=jnp.where(is_off, jnp.int32(LARGEST_INT), jnp.maximum(state.resting, 1)),
        )

    def _balance(self, state, left):
        """Return what is left of the allowance, f32 []."""
        asked = jnp.max(state.done + left)
        allowance = ALLOWANCE_OF_ALL * asked.astype(jnp.float32)
        if state.done.shape[0] == 1:
            allowance = jnp.minimum(allowance, ALLOWANCE)
        allowance *= self.allowance
        plain = (asked - jnp.max(left)).astype(jnp.float32) * self.times[0, 1]
        return allowance + LOSS * plain - (state.time - state.unheld)

    def update(self, state, counts):
        """Return what is known after a round (see `Control`)."""
        made = [(each.rounds + each.accepted.sum(axis=1)).astype(jnp.float32) for each in counts]  # [B], of all rounds so far
        plain = jnp.max(made[0]) * self.times[0, 1]
        time = modelled(self.times, counts) + self.asking * counts[0].in_vain.astype(jnp.float32)
        ahead = LOSS * plain - time
        resting = jnp.maximum(state.resting - (counts[0].passes - state.passed), 0)
        so_far = state._replace(
            done=made[0].astype(jnp.int32),
            time=time,
            least=jnp.minimum(state.least, ahead),
            resting=resting,
            passed=counts[0].passes,
        )
        learnt = self._learnt(so_far, counts, ahead)
        return jax.tree.map(functools.partial(jnp.where, resting > 0), so_far, learnt)

    def _learnt(self, state, counts, ahead):
        """Learn from the rounds since `state.last`: one, or a rest."""
        new = jax.tree.map(jnp.subtract, counts, state.last)
        seen = jnp.stack([each.by_class for each in new]).astype(jnp.float32)  # [L, 2, B, 8, 2]
        made = [(each.rounds + each.accepted.sum(axis=1)).astype(jnp.float32) for each in new]
        verdicts = seen[..., 1].sum(-1)  # [L, 2, B]
        kept = FORGET_A_VERDICT**verdicts * FORGET_A_TOKEN ** made[0][None, None]
        prior = self.prior[:, :, None]
        tables = prior + (state.tables - prior) * kept[..., None, None] + seen
        asking = self.asking * new[0].in_vain.astype(jnp.float32)
        times = jnp.stack([modelled(self.times[i:], new[i:]) for i in range(len(new))]).at[0].add(asking)
        passes = jnp.stack([each.passes for each in new]).astype(jnp.float32)
        rounds = jnp.stack([jnp.maximum(each.rounds.sum(), 1) for each in new]).astype(jnp.float32)
        each_pass = jnp.stack([tokens.sum() for tokens in made]) / rounds
        pace = FORGET_A_PACE ** passes[:, None] * state.pace + jnp.stack([passes, times, passes * each_pass], axis=1)
        drafted, accepted = seen[0, MODEL, ..., 1].sum() > 0, seen[0, MODEL, ..., 0].sum() > 0
        period = jnp.where(accepted, FIRST_RETRY, state.idle[1])
        tried = drafted & (state.idle[0] >= state.idle[1]) & ~accepted
        period = jnp.where(tried, jnp.minimum(2 * period, LAST_RETRY), period)
        unheld = jnp.where(state.credit >= self.asking, asking, 0)
        credit = jnp.minimum(state.credit + ASKING * times[0] - unheld, ASKING_AT_ONCE)
        # Of a rest's rounds each later one counts more, as if they had been learnt from one by one.
        weight = (1 - FORGET_A_ROUND ** passes[0]) / (jnp.maximum(passes[0], 1) * (1 - FORGET_A_ROUND))
        of_rounds = jnp.stack([made[0], jnp.broadcast_to(times[0], made[0].shape)], axis=1)
        may_ask = (credit >= self.asking) | (ahead + unheld + state.unheld >= self.asking)
        return state._replace(
            tables=tables,
            made=FORGET_A_ROUND ** passes[0] * state.made + weight * of_rounds,
            pace=pace,
            credit=credit,
            unheld=state.unheld + unheld,
            resting=jnp.where(may_ask, 0, REST),
            idle=jnp.stack([jnp.where(drafted, 0, state.idle[0] + new[0].passes), period]).astype(jnp.int32),
            last=counts,
        )
