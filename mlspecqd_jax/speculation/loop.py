"""The generation loop: the outermost level's rounds, in one `lax.while_loop`, resumable between calls.

Generating is proposing with nobody above: the same round as a draft's, with limits and the prompt's place given by the caller.

Notation: B batch, S buffer length.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mlspecqd_jax import jax_settings
from mlspecqd_jax.arguments import LARGEST_INT, instance, integers, is_array, number
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.speculation.level import SLACK, DrafterState, Level, State, is_unfinished, run_round
from mlspecqd_jax.speculation.protocols import Sequences
from mlspecqd_jax.speculation.settings import Sampling

PREFILL_WIDTH = 256


def buffer_length(longest: int, multiple: int = 256) -> int:
    """Return S for sequences of up to `longest` tokens: the next multiple of 256 that leaves room for one window of any stack."""
    longest, multiple = number("longest", longest), number("multiple", multiple)
    return math.ceil((longest + SLACK) / multiple) * multiple


@jax_settings.held
def init(stack: Level, tokens: jax.Array, length: jax.Array, sampling: Sampling, *, prefill_width: int = PREFILL_WIDTH) -> State:
    """Feed all prompt tokens but the last, which becomes the pending one.

    Args:
      stack: the outermost level.
      tokens: int32 [B, S], left-aligned prompts; S at least the final length plus SLACK (`buffer_length`).
      length: int32 [B], prompt lengths, at least 1.
      sampling: the rows' settings.
      prefill_width: static; prompts are fed in pieces of (at most) this many tokens.
    """
    return feed(stack, begin(stack, tokens, length, sampling, prefill_width=prefill_width), prefill_width=prefill_width)


@jax_settings.held
def begin(stack: Level, tokens: jax.Array, length: jax.Array, sampling: Sampling, *, prefill_width: int = PREFILL_WIDTH) -> State:
    """Return the state before the prompts are fed, for `feed`; the arguments are those of `init`."""
    check(stack, sampling)
    number("prefill_width", prefill_width)
    batch, size = integers("tokens", tokens, "BS").shape
    _check_rows("length", integers("length", length, "B").shape[0], batch)
    _check_rows("sampling", sampling.seed.shape[0], batch)
    widest = max(level.window(i) for i, level in enumerate(stack.levels))
    if size < widest + 1:
        raise InputError(f"tokens has {size} positions, but a window of {widest} needs more; see buffer_length")
    prompts = Sequences(jnp.asarray(tokens).astype(jnp.int32), jnp.asarray(length).astype(jnp.int32))
    below = stack.begin(prompts, prefill_width)
    return State(
        tokens=prompts.tokens,
        length=prompts.length,
        begin=prompts.length,
        ended=jnp.zeros((batch,), bool),
        broken=jnp.zeros((batch,), bool),
        cache=below.cache,
        below=below.below,
        counts=below.counts,
        probs=None,
        logprobs=jnp.zeros((batch, size), jnp.float32) if sampling.logprobs else None,
    )


@jax_settings.held
def feed(
    stack: Level,
    state: State,
    *,
    prefill_width: int = PREFILL_WIDTH,
    first: jax.Array | int = 0,
    pieces: jax.Array | int | None = None,
) -> State:
    """Feed the prompts' pieces `first` to `first + pieces - 1` (None: all from `first` on), each of (at most) prefill_width."""
    fed = stack.feed(
        DrafterState(state.cache, state.below, state.counts), Sequences(state.tokens, state.begin), prefill_width, first, pieces
    )
    return state._replace(cache=fed.cache, below=fed.below, counts=fed.counts)


def check(stack: Level, sampling: Sampling) -> None:
    """Raise an InputError unless the stack can be run as the outermost level, with these settings."""
    check_stack(stack)
    instance("sampling", sampling, Sampling, "settings that Sampling.create made")
    if sampling.vocab_size != stack.model.vocab_size:
        raise InputError(
            f"sampling is for a vocabulary of {sampling.vocab_size}, but the target's has {stack.model.vocab_size}; "
            "create it with the target's"
        )
    rates, judges = sampling.synthetic_acceptance, sum(level.draft_len > 0 for level in stack.levels)
    if rates is not None and len(rates) != judges:
        raise InputError(
            f"synthetic_acceptance has {len(rates)} rates, but {judges} levels of the stack judge a draft; give one rate for each"
        )


def check_stack(stack: Level) -> None:
    """Raise an InputError unless this is a stack: a level, and the outermost one."""
    instance("stack", stack, Level, "a stack: build it with mlsd.stack(model, *drafters)")
    if stack.share_cache:
        raise InputError("the outermost level has no verifier whose cache it could share; build it with share_cache=False")


@jax_settings.held
def finished(state: State, limit: jax.Array) -> jax.Array:
    """Return bool [B]: which rows have ended, broken or reached their limit (or the end of the buffer)."""
    return ~is_unfinished(state, _clipped(limit, state))


@jax_settings.held
def step(stack: Level, state: State, limit: jax.Array, sampling: Sampling) -> State:
    """Run one round: append 1 to draft_len + 1 tokens to every unfinished row.

    Args:
      stack: the outermost level.
      state: from `init`, `step` or `advance`.
      limit: int32 [B], the length at which a row is finished, prompt counted.
      sampling: the rows' settings; may differ from call to call.
    """
    check(stack, sampling)
    sampling = dataclasses.replace(sampling, prompt_length=_checked(state).begin)
    return run_round(stack, state, _clipped(limit, state), sampling)


@jax_settings.held
def advance(stack: Level, state: State, limit: jax.Array, sampling: Sampling, rounds: jax.Array | int | None = None) -> State:
    """Run rounds until every row is finished, or at most `rounds` of them (None: no bound), in one `lax.while_loop`."""
    check(stack, sampling)
    limit = _clipped(limit, _checked(state))
    rounds = LARGEST_INT if rounds is None else rounds
    bound = integers("rounds", rounds, "") if isinstance(rounds, jax.Array) else number("rounds", rounds)
    bound = jnp.asarray(bound, jnp.int32)

    def more(carry):
        done, state = carry
        return (done < bound) & ~jnp.all(finished(state, limit))

    def body(carry):
        done, state = carry
        return done + 1, step(stack, state, limit, sampling)

    return jax.lax.while_loop(more, body, (jnp.int32(0), state))[1]


@jax_settings.held
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
    limit = _limit(limit, *integers("tokens", tokens, "BS").shape)
    state = advance(stack, init(stack, tokens, length, sampling, prefill_width=prefill_width), limit, sampling)
    return state.tokens, state.length, state


def _checked(state: State) -> State:
    return instance("state", state, State, "a state that init, step or advance returned")


def _check_rows(name: str, rows: int, batch: int) -> None:
    if rows != batch:
        raise InputError(f"{name} is for {rows} rows, but tokens has {batch}; give one for each")


def _clipped(limit: jax.Array | int, state: State) -> jax.Array:
    return _limit(limit, *_checked(state).tokens.shape)


def _limit(limit: jax.Array | int, batch: int, size: int) -> jax.Array:
    """Return the limit [B], or the length that leaves room for one window at the end of the buffer, if that is less."""
    if not isinstance(limit, (np.ndarray, jax.Array)) or (limit.ndim == 0 and is_array(limit)):
        limit = jnp.full((batch,), number("limit", limit), jnp.int32)
    _check_rows("limit", integers("limit", limit, "B").shape[0], batch)
    return jnp.minimum(jnp.asarray(limit).astype(jnp.int32), size - SLACK)
