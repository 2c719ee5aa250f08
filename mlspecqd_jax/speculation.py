"""The generation loop: the outermost level's rounds, in one `lax.while_loop`, resumable between calls.

Generating is proposing with nobody above: the same round as a draft's, with limits and the prompt's place given by the caller.

Notation: B batch, S buffer length.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mlspecqd_jax.levels import SLACK, Level, Progress, Sequences, is_open, run_round
from mlspecqd_jax.sampling import Sampling

PREFILL_WIDTH = 256
State = Progress  # of the outermost level; `begin` is the prompts' length


def buffer_length(longest: int, multiple: int = 256) -> int:
    """Return S for sequences of up to `longest` tokens: the next multiple of 256 that leaves room for one window of any stack."""
    return math.ceil((longest + SLACK) / multiple) * multiple


def init(stack: Level, tokens: jax.Array, length: jax.Array, sampling: Sampling, *, prefill_width: int = PREFILL_WIDTH) -> State:
    """Feed all prompt tokens but the last, which becomes the pending one.

    Args:
      stack: the outermost level.
      tokens: int32 [B, S], left-aligned prompts; S at least the final length plus SLACK (`buffer_length`).
      length: int32 [B], prompt lengths, at least 1.
      sampling: the rows' settings.
      prefill_width: static; prompts are fed in pieces of (at most) this many tokens.
    """
    batch, size = tokens.shape
    widest = max(level.window(number) for number, level in enumerate(stack.levels))
    if size < widest + 1:
        raise ValueError(f"tokens has {size} positions, but a window of {widest} needs more; see buffer_length")
    check(stack, sampling)
    prompts = Sequences(tokens.astype(jnp.int32), length.astype(jnp.int32))
    below = stack.init(prompts, prefill_width)
    return State(
        tokens=prompts.tokens,
        length=prompts.length,
        begin=prompts.length,
        ended=jnp.zeros((batch,), bool),
        cache=below.cache,
        below=below.below,
        counts=below.counts,
        probs=None,
        logprobs=jnp.zeros((batch, size), jnp.float32) if sampling.logprobs else None,
    )


def check(stack: Level, sampling: Sampling) -> None:
    """Raise a ValueError unless the stack can be run as the outermost level, with these settings."""
    if stack.share_cache:
        raise ValueError("the outermost level has no verifier whose cache it could share; build it with share_cache=False")
    if sampling.vocab_size != stack.model.vocab_size:
        raise ValueError(
            f"sampling is for a vocabulary of {sampling.vocab_size}, but the target's has {stack.model.vocab_size}; "
            "create it with the target's"
        )
    rates, judges = sampling.synthetic_acceptance, sum(level.draft_len > 0 for level in stack.levels)
    if rates is not None and len(rates) != judges:
        raise ValueError(
            f"synthetic_acceptance has {len(rates)} rates, but {judges} levels of the stack judge a draft; give one rate for each"
        )


def finished(state: State, limit: jax.Array) -> jax.Array:
    """Return bool [B]: which rows have ended or reached their limit (or the end of the buffer)."""
    return ~is_open(state, _clipped(limit, state))


def step(stack: Level, state: State, limit: jax.Array, sampling: Sampling) -> State:
    """Run one round: append 1 to draft_len + 1 tokens to every unfinished row.

    Args:
      stack: the outermost level.
      state: from `init`, `step` or `advance`.
      limit: int32 [B], the length at which a row is finished, prompt counted.
      sampling: the rows' settings; may differ from call to call.
    """
    sampling = dataclasses.replace(sampling, prompt_length=state.begin)
    return run_round(stack, state, _clipped(limit, state), sampling)


def advance(stack: Level, state: State, limit: jax.Array, sampling: Sampling, rounds: jax.Array | int | None = None) -> State:
    """Run rounds until every row is finished, or at most `rounds` of them (None: no bound), in one `lax.while_loop`."""
    bound = jnp.int32(2**31 - 1) if rounds is None else jnp.asarray(rounds, jnp.int32)

    def more(carry):
        done, state = carry
        return (done < bound) & ~jnp.all(finished(state, limit))

    def body(carry):
        done, state = carry
        return done + 1, step(stack, state, limit, sampling)

    return jax.lax.while_loop(more, body, (jnp.int32(0), state))[1]


def generate_tokens(
    stack: Level,
    tokens: jax.Array,
    length: jax.Array,
    limit: jax.Array,
    sampling: Sampling,
    *,
    prefill_width: int = PREFILL_WIDTH,
) -> tuple[jax.Array, jax.Array, State]:
    """Continue every row up to its limit; pure, and callable inside the user's own `jax.jit`.

    Args:
      stack: the outermost level.
      tokens: int32 [B, S] prompts, left-aligned, with S as `buffer_length` gives it.
      length: int32 [B] prompt lengths.
      limit: int32 [B] final lengths, prompt counted; clipped to S - SLACK.
      sampling: the rows' settings.
      prefill_width: static, see `init`.

    Returns:
      (tokens [B, S], length [B], state): row r's text is tokens[r, :length[r]]. `advance` continues from the state.
    """
    state = advance(stack, init(stack, tokens, length, sampling, prefill_width=prefill_width), limit, sampling)
    return state.tokens, state.length, state


def _clipped(limit: jax.Array, state: State) -> jax.Array:
    """Return the limit, or the length that leaves room for one window at the end of the buffer, if that is less."""
    return jnp.minimum(limit, state.tokens.shape[1] - SLACK)
