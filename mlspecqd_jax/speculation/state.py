"""What goes around with the rounds of a level: its state in a loop, and what it keeps as a drafter between two loops.

Notation: B batch, S buffer length, G draft_len, V vocabulary, F features.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.speculation.counts import Counts


class DrafterState(NamedTuple):
    """What a level keeps between rounds of the level above it."""

    cache: Any  # None where it shares its verifier's
    features: jax.Array | None  # of the last pass, [B, draft_len + 1, F], where its drafter uses them
    scored_from: jax.Array  # int32 [B], the position of the first of these
    fed: jax.Array  # int32 [B], how many leading positions its own cache holds
    below: Any  # its drafter's state
    counts: Counts


class State(NamedTuple):
    """Everything that a round of a level reads and writes."""

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]
    begin: jax.Array  # int32 [B], the length before the first round
    ended: jax.Array  # bool [B], whether the last token is a stop token
    broken: jax.Array  # bool [B], whether the target's logits after the last token are no numbers to choose by
    cache: Any
    features: jax.Array | None  # of the last pass, [B, draft_len + 1, F], where the drafter uses them
    scored_from: jax.Array  # int32 [B], the position of the first of these
    fed: jax.Array  # int32 [B], how many leading positions the cache holds
    below: Any  # the drafter's state
    counts: Counts
    probs: jax.Array | None  # f32 [B, G, V], what the tokens from `begin` on were drawn from: under the rejection rule, for a draft
    logprobs: jax.Array | None  # f32 [B, S], of the tokens chosen, when asked for
    classes: jax.Array | None = None  # int32 [B, G], of `guide`, of the tokens from `begin` on: for a draft that is guided
    control: Any = None  # a `Control` of all levels below, where there is nobody above
    plan: Any = None  # the control's state


def is_unfinished(progress: State, limit: jax.Array) -> jax.Array:
    """Return bool [B]: which rows have neither ended, nor broken, nor reached their limit."""
    return ~progress.ended & ~progress.broken & (progress.length < limit)


def rolled_back(state: Any, fed: jax.Array) -> Any:
    """Return a drafter's state in which all caches hold at most `fed` [B] positions: what follows was not accepted."""
    if not isinstance(state, DrafterState):
        return state
    return state._replace(fed=jnp.minimum(state.fed, fed), below=rolled_back(state.below, fed))


def counts_of(state: State | DrafterState) -> tuple[Counts, ...]:
    """Return the counts of a level and of those below, outermost first."""
    return (state.counts, *(counts_of(state.below) if isinstance(state.below, DrafterState) else ()))
