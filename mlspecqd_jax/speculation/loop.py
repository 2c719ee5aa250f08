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
from mlspecqd_jax.arguments import LARGEST_INT, brief, instance, integers, is_array, number, whole
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.speculation.buffers import SLACK, padded
from mlspecqd_jax.speculation.control import Fixed
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.protocols import Control, Lent
from mlspecqd_jax.speculation.rounds import run_rounds
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.stack import Stack, outermost
from mlspecqd_jax.speculation.state import DrafterState, State, is_unfinished

PREFILL_WIDTH = 256


def buffer_length(longest: int, multiple: int = 256) -> int:
    """Return S for sequences of up to `longest` tokens: the next multiple of 256 that leaves room for one window of any stack."""
    longest, multiple = whole("longest", longest), whole("multiple", multiple)
    return math.ceil((longest + SLACK) / multiple) * multiple


@jax_settings.held
def init(
    stack: Stack | Level,
    tokens: jax.Array,
    length: jax.Array,
    sampling: Sampling,
    *,
    control: Control | None = None,
    prefill_width: int = PREFILL_WIDTH,
) -> State:
    """Feed all prompt tokens but the last, which becomes the pending one.

    Args:
      stack: from `mlsd.stack`, or a level that is to be the outermost.
      tokens: int32 [B, S], left-aligned prompts; S at least the final length plus SLACK (`buffer_length`).
      length: int32 [B], prompt lengths, at least 1.
      sampling: the rows' settings.
      control: of draft lengths; None is the stack's own, or else lets every level draft its draft_len.
      prefill_width: static; prompts are fed in pieces of (at most) this many tokens.
    """
    prefill_width = whole("prefill_width", prefill_width)
    return feed(stack, begin(stack, tokens, length, sampling, control=control), prefill_width=prefill_width)


@jax_settings.held
def begin(
    stack: Stack | Level, tokens: jax.Array, length: jax.Array, sampling: Sampling, *, control: Control | None = None
) -> State:
    """Return the state before the prompts are fed, for `feed`; the arguments are those of `init`."""
    level = check(stack, sampling)
    batch, size = integers("tokens", tokens, "BS").shape
    _check_rows("length", integers("length", length, "B").shape[0], batch)
    _check_rows("sampling", sampling.seed.shape[0], batch)
    widest = max(each.window(depth) for depth, each in enumerate(level.levels))
    if size < widest + 1:
        raise InputError(f"tokens has {size} positions, but a window of {widest} needs more; see buffer_length")
    control = stack.control if control is None and isinstance(stack, Stack) else control
    control = Fixed.create(batch) if control is None else control
    if not all(hasattr(control, method) for method in ("init", "limits", "guide", "update")):
        raise InputError(
            f"control is {brief(control)}, but must have init, limits, guide and update: see mlsd.Control, or leave it out"
        )
    length = jnp.asarray(length).astype(jnp.int32)
    empty = level.init(batch, size)
    return State(
        tokens=jnp.asarray(tokens).astype(jnp.int32),
        length=length,
        begin=length,
        ended=jnp.zeros((batch,), bool),
        broken=jnp.zeros((batch,), bool),
        cache=empty.cache,
        features=empty.features,
        scored_from=empty.scored_from,
        fed=length - 1,
        below=empty.below,
        counts=empty.counts,
        probs=None,
        logprobs=jnp.zeros((batch, size), jnp.float32) if sampling.logprobs else None,
        control=control,
        plan=control.init(level.draft_lens, batch),
    )


@jax_settings.held
def feed(
    stack: Stack | Level,
    state: State,
    *,
    prefill_width: int = PREFILL_WIDTH,
    first: jax.Array | int = 0,
    pieces: jax.Array | int | None = None,
) -> State:
    """Feed the prompts' pieces `first` to `first + pieces - 1` (None: all from `first` on), each of (at most) prefill_width."""
    level = outermost(stack)
    batch, size = _checked(state).tokens.shape
    width = piece_width(prefill_width, size)
    first = jnp.asarray(first, jnp.int32)
    end = (jnp.max(state.begin) - 1 + width - 1) // width
    if pieces is not None:
        end = jnp.minimum(end, first + pieces)

    def feed_piece(i, fed):
        start = jnp.full((batch,), i * width, jnp.int32)
        piece = jax.lax.dynamic_slice(state.tokens, (0, i * width), (batch, width))
        return level.feed(fed, padded(piece, start, state.begin - 1), start, Lent(None, None, start))

    fed = DrafterState(state.cache, state.features, state.scored_from, state.fed, state.below, state.counts)
    return state._replace(**jax.lax.fori_loop(first, end, feed_piece, fed)._asdict())


def piece_width(prefill_width: int, size: int) -> int:
    """Return the width of the pieces in which prompts are fed to a buffer of `size`: at most prefill_width, and they fill it."""
    return math.gcd(whole("prefill_width", prefill_width), size)


def check(stack: Stack | Level, sampling: Sampling) -> Level:
    """Return the outermost level, or raise an InputError unless the stack can be run with these settings."""
    level = outermost(stack)
    instance("sampling", sampling, Sampling, "settings that Sampling.create made")
    if sampling.vocab_size != level.model.vocab_size:
        raise InputError(
            f"sampling is for a vocabulary of {sampling.vocab_size}, but the target's has {level.model.vocab_size}; "
            "create it with the target's"
        )
    rates, judges = sampling.synthetic_acceptance, len(level.draft_lens)
    if rates is not None and len(rates) != judges:
        raise InputError(
            f"synthetic_acceptance has {len(rates)} rates, but {judges} levels of the stack judge a draft; give one rate for each"
        )
    return level


@jax_settings.held
def finished(state: State, limit: jax.Array) -> jax.Array:
    """Return bool [B]: which rows have ended, broken or reached their limit (or the end of the buffer)."""
    return ~is_unfinished(state, _clipped(limit, state))


@jax_settings.held
def step(stack: Stack | Level, state: State, limit: jax.Array, sampling: Sampling) -> State:
    """Run one round: append 1 to draft_len + 1 tokens to every unfinished row.

    Args:
      stack: the one that the state is of.
      state: from `init`, `step` or `advance`.
      limit: int32 [B], the length at which a row is finished, prompt counted.
      sampling: the rows' settings; may differ from call to call.
    """
    return _rounds(check(stack, sampling), _checked(state), _clipped(limit, state), sampling, jnp.int32(1))[0]


@jax_settings.held
def advance(
    stack: Stack | Level, state: State, limit: jax.Array, sampling: Sampling, rounds: jax.Array | int | None = None
) -> State:
    """Run rounds until every row is finished, or at most `rounds` of them (None: no bound), in one `lax.while_loop`."""
    level = check(stack, sampling)
    limit = _clipped(limit, _checked(state))
    rounds = LARGEST_INT if rounds is None else rounds
    bound = integers("rounds", rounds, "") if isinstance(rounds, jax.Array) else number("rounds", rounds)
    bound = jnp.asarray(bound, jnp.int32)

    def more(carry):
        done, state = carry
        return (done < bound) & ~jnp.all(finished(state, limit))

    def body(carry):
        done, state = carry
        state, more = _rounds(level, state, limit, sampling, bound - done)
        return done + more, state

    return jax.lax.while_loop(more, body, (jnp.int32(0), state))[1]


def _rounds(level: Level, state: State, limit: jax.Array, sampling: Sampling, most: jax.Array) -> tuple[State, jax.Array]:
    return run_rounds(level, state, limit, dataclasses.replace(sampling, prompt_length=state.begin), most)


@jax_settings.held
def generate_tokens(
    stack: Stack | Level,
    tokens: jax.Array,
    length: jax.Array,
    limit: jax.Array,
    sampling: Sampling,
    *,
    control: Control | None = None,
    prefill_width: int = PREFILL_WIDTH,
) -> tuple[jax.Array, jax.Array, State]:
    """Continue every row up to its limit; pure, and callable inside the user's own `jax.jit`.

    Args:
      stack: from `mlsd.stack`, or a level that is to be the outermost.
      tokens: int32 [B, S] prompts, left-aligned, with S as `buffer_length` gives it.
      length: int32 [B] prompt lengths.
      limit: int32 [B] final lengths, prompt counted; clipped to S - SLACK.
      sampling: the rows' settings.
      control: of draft lengths, see `init`.
      prefill_width: static, see `init`.

    Returns:
      (tokens [B, S], length [B], state): row r's text is tokens[r, :length[r]]. `advance` continues from the state.
    """
    limit = _limit(limit, *integers("tokens", tokens, "BS").shape)
    state = advance(stack, init(stack, tokens, length, sampling, control=control, prefill_width=prefill_width), limit, sampling)
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
