"""Rounds of the outermost level: one with a draft, or plain ones where none is wanted.

A plain round is the level's without its drafter, so that decoding with a drafter that is off is plain decoding, operation for
operation. Where all windows have one width, every round is one of the whole level: it computes as much in any case.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.protocols import check_limits
from mlspecqd_jax.speculation.round import propose, run_round, verified
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.state import State, counts_of, is_unfinished
from mlspecqd_jax.speculation.widths import run_if


def run_rounds(level: Level, state: State, limit: jax.Array, sampling: Sampling, most: jax.Array) -> tuple[State, jax.Array]:
    """Run a round, or, where a guide says so, several plain ones; return how many too, int32 [].

    Args:
      level: the outermost.
      state: where the rows stand.
      limit: int32 [B], the length at which a row is finished.
      sampling: the rows' settings.
      most: int32 [], how many there may be, at least 1.
    """
    control, plan, batch = state.control, state.plan, state.length.shape[0]
    limits = check_limits(control.limits(plan), control, len(level.draft_lens), batch)
    unfinished = is_unfinished(state, limit)
    guide = control.guide(plan, jnp.where(unfinished, limit - state.length, 0))
    alone = _alone(level)
    state = state._replace(control=None, plan=None)  # neither changes within
    if alone is None:
        state, done = run_round(level, state, limit, sampling, limits, guide=guide), jnp.int32(1)
    else:
        # Of a token that ends a row none is drafted.
        asked, rest = jnp.any(unfinished & (limits[0] > 0) & (limit - state.length > 1)), jnp.int32(1)
        if guide is not None:
            asked, rest = asked & guide.asks, guide.rest
        asked |= level.must_follow

        def with_draft(carry):
            state, _ = carry
            proposed = propose(level, state, limit, sampling, limits, guide=guide)
            drafted = jnp.any(proposed.draft.length > 0)
            state = state._replace(cache=proposed.cache, below=proposed.below)

            def judge(state):
                again = proposed._replace(cache=state.cache, below=state.below)
                return verified(level, state, again, limit, sampling, tuple(width for width in level.all_widths() if width > 1))

            return run_if(drafted, judge, state), drafted

        state, drafted = run_if(asked, with_draft, (state, jnp.bool_(False)))
        state = state._replace(counts=state.counts.asked_in_vain(asked & ~drafted))
        plain = jnp.where(drafted, 0, jnp.where(asked, 1, jnp.minimum(most, rest)))
        state, done = _plain_rounds(alone, state, limit, sampling, plain)
        done += drafted.astype(jnp.int32)
    return state._replace(control=control, plan=control.update(plan, counts_of(state))), done


def _alone(level: Level) -> Level | None:
    """Return a level without its drafter, to run rounds in which nothing is drafted, or None where it has no window for them."""
    alone = dataclasses.replace(level, drafter=None, draft_len=0, widths=())
    widths = level.all_widths()
    return alone if len(widths) > 1 and widths[0] == alone.window() and not level.lends_features else None


def _plain_rounds(level: Level, state: State, limit: jax.Array, sampling: Sampling, most: jax.Array) -> tuple[State, jax.Array]:
    nothing_below = jnp.zeros((0, state.length.shape[0]), jnp.int32)

    def more(carry):
        done, state = carry
        return (done < most) & jnp.any(is_unfinished(state, limit))

    def body(carry):
        done, state = carry
        return done + 1, run_round(level, state, limit, sampling, nothing_below)

    done, state = jax.lax.while_loop(more, body, (jnp.int32(0), state))
    return state, done
