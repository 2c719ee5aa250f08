"""The generation loop: levels, rounds, and the state that goes around.

One round (`step`) takes a draft, scores it in one pass of the level's model, and appends 1 to draft_len + 1 tokens, each an exact
sample of that model. Plain decoding is the level without a drafter: its draft is empty and its window is the pending token.

Notation: B batch, S buffer length, W window, G draft_len, V vocabulary. `length` is the only position state: the token at
length - 1 is *pending* (chosen, not yet fed to the model); caches are indexed by absolute position and whatever lies beyond the
length is neither read nor trimmed. Rows that are finished go around with the others and change nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mlspecqd_jax.sampling import Sampling, adjust, log_probability
from mlspecqd_jax.verification import Draft, Verdict, verify

SLACK = 64  # buffer positions beyond the last token, for the window of one round of any stack
PREFILL_WIDTH = 256


class Model(Protocol):
    """A pure, hashable scoring function of parameters.

    Law: logits[:, w] depend on the tokens at absolute positions up to start + w alone, as fed in this call and, below start, as
    last fed in earlier ones. Entries of the cache beyond them, and other rows, change nothing.
    """

    vocab_size: int

    def init_cache(self, batch: int, length: int, params: Any) -> Any:
        """Return an empty cache of `length` positions."""

    def __call__(self, params: Any, tokens: jax.Array, start: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Feed tokens [B, W] at positions start[r] + 0..W-1; return (logits f32 [B, W, V], cache)."""


class Sequences(NamedTuple):
    """Left-aligned rows of tokens."""

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]


class Drafter(Protocol):
    """A pytree that proposes what comes next.

    Law: each proposed token was drawn from exactly the distribution handed up with it.
    """

    def init(self, batch: int, length: int) -> Any:
        """Return the drafter's state for buffers of `length` positions."""

    def propose(
        self, state: Any, cache: Any, sequences: Sequences, sampling: Sampling, draft_len: int, limit: jax.Array, behind: int
    ) -> tuple[Draft, Any, Any]:
        """Propose up to limit[r] <= draft_len tokens a row.

        Args:
          state: the drafter's own state.
          cache: the verifier's cache, handed down for drafters that share it and handed back.
          sequences: what is committed so far.
          sampling: the rows' settings; the only noise is a function of its seeds, positions, levels and purposes.
          draft_len: static maximum G.
          limit: int32 [B], how many tokens are of use this round.
          behind: how many committed tokens a cache of the drafter's own may lack.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """A model, its parameters, and what drafts for it; a pytree whose leaves are the parameters of all levels below.

    The outermost level is the *stack* that the public functions take.
    """

    model: Model = dataclasses.field(metadata={"static": True})
    params: Any
    drafter: Drafter | None = None
    draft_len: int = dataclasses.field(metadata={"static": True}, default=0)
    # Every window is rounded up to a multiple of this many rows, so that stacks of any draft_len compute a row alike (exactness).
    window_multiple: int = dataclasses.field(metadata={"static": True}, default=1)
    # Whatever a caller keeps with the level, such as its name and tokenizer; never read here.
    card: Hashable = dataclasses.field(metadata={"static": True}, default=None)

    def __post_init__(self):
        if (self.drafter is None) != (self.draft_len == 0) or self.draft_len < 0:
            raise ValueError(
                f"draft_len is {self.draft_len} {'without' if self.drafter is None else 'with'} a drafter; "
                "give both, or neither for plain decoding"
            )
        if self.window > SLACK:
            raise ValueError(f"draft_len {self.draft_len} needs a window of {self.window} positions; at most {SLACK} are supported")

    @property
    def window(self) -> int:
        """Number of positions that one round feeds to the model."""
        return math.ceil((self.draft_len + 1) / self.window_multiple) * self.window_multiple


class Counts(NamedTuple):
    """What happened to the drafts that a level judged, over unfinished rows."""

    rounds: jax.Array  # int32 [B]
    drafted: jax.Array  # int32 [B]
    accepted: jax.Array  # int32 [B, G], by position in the draft
    judged: jax.Array  # int32 [B, G]
    passes: jax.Array  # int32, passes of the level's model in rounds (prefill apart)


class State(NamedTuple):
    """Everything that a round reads and writes; resumable, and donated from call to call."""

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]
    prompt_length: jax.Array  # int32 [B]
    ended: jax.Array  # bool [B], whether the last token is a stop token
    cache: Any
    below: Any  # the drafter's state
    counts: Counts
    logprobs: jax.Array | None  # f32 [B, S], of the tokens chosen, when asked for


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
    if size < stack.window + 1:
        raise ValueError(f"tokens has {size} positions, but a window of {stack.window} needs more; see buffer_length")
    width = math.gcd(prefill_width, size)
    length = length.astype(jnp.int32)
    pieces = (jnp.max(length) - 1 + width - 1) // width

    def feed(i, cache):
        start = i * width
        window = jax.lax.dynamic_slice(tokens, (0, start), (batch, width))
        return stack.model(stack.params, window, jnp.full((batch,), start, jnp.int32), cache)[1]

    cache = jax.lax.fori_loop(0, pieces, feed, stack.model.init_cache(batch, size, stack.params))
    g = stack.draft_len
    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    return State(
        tokens=tokens.astype(jnp.int32),
        length=length,
        prompt_length=length,
        ended=jnp.zeros((batch,), bool),
        cache=cache,
        below=None if stack.drafter is None else stack.drafter.init(batch, size),
        counts=Counts(zeros((batch,)), zeros((batch,)), zeros((batch, g)), zeros((batch, g)), zeros(())),
        logprobs=jnp.zeros((batch, size), jnp.float32) if sampling.logprobs else None,
    )


def finished(state: State, limit: jax.Array) -> jax.Array:
    """Return bool [B]: which rows have ended or reached their limit (or the end of the buffer)."""
    return state.ended | (state.length >= _clipped(limit, state))


def step(stack: Level, state: State, limit: jax.Array, sampling: Sampling) -> State:
    """Run one round: append 1 to draft_len + 1 tokens to every unfinished row.

    Args:
      stack: the outermost level.
      state: from `init`, `step` or `advance`.
      limit: int32 [B], the length at which a row is finished, prompt counted.
      sampling: the rows' settings; may differ from call to call.
    """
    sampling = dataclasses.replace(sampling, prompt_length=state.prompt_length)
    limit = _clipped(limit, state)
    open_ = ~finished(state, limit)
    draft, below, cache = _propose(stack, state, limit, sampling)
    tokens = put(state.tokens, state.length, draft.tokens)
    logits, cache = stack.model(stack.params, read(tokens, state.length - 1, stack.window), state.length - 1, cache)
    logits = logits[:, : stack.draft_len + 1]
    position = state.length[:, None] + jnp.arange(stack.draft_len + 1)[None, :]
    verdict = verify(adjust(logits, tokens, position, sampling), draft, state.length, sampling)
    appended, ended = _cut(verdict, state.length, limit, open_, sampling.stop_token_ids)
    logprobs = state.logprobs
    if logprobs is not None:
        logprobs = put(logprobs, state.length, log_probability(logits, verdict.tokens))
    return State(
        tokens=put(tokens, state.length, verdict.tokens),
        length=state.length + appended,
        prompt_length=state.prompt_length,
        ended=state.ended | ended,
        cache=cache,
        below=below,
        counts=_count(state.counts, draft, verdict, appended, open_),
        logprobs=logprobs,
    )


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


def put(buffer: jax.Array, start: jax.Array, values: jax.Array) -> jax.Array:
    """Write values [B, n] into buffer [B, S] at start[r] + 0..n-1; what falls beyond the buffer is dropped."""
    row = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[row, start[:, None] + jnp.arange(values.shape[1])[None, :]].set(values, mode="drop")


def read(buffer: jax.Array, start: jax.Array, n: int) -> jax.Array:
    """Return buffer [B, S] at start[r] + 0..n-1, int32 [B, n]."""
    return jnp.take_along_axis(buffer, start[:, None] + jnp.arange(n)[None, :], axis=1, mode="clip")


def _clipped(limit: jax.Array, state: State) -> jax.Array:
    """Return the limit, or the length that leaves room for one window at the end of the buffer, if that is less."""
    return jnp.minimum(limit, state.tokens.shape[1] - SLACK)


def _propose(stack: Level, state: State, limit: jax.Array, sampling: Sampling):
    if stack.drafter is None:
        return Draft.empty(state.tokens.shape[0], stack.model.vocab_size), state.below, state.cache
    # The token after the draft comes from the verifier, so one less than what is missing is of use.
    useful = jnp.clip(limit - state.length - 1, 0, stack.draft_len)
    sequences = Sequences(state.tokens, state.length)
    return stack.drafter.propose(state.below, state.cache, sequences, sampling, stack.draft_len, useful, 1)


def _cut(verdict: Verdict, length, limit, open_, stop_token_ids):
    """Return how many of the verdict's tokens each row keeps, and whether the last kept one is a stop token."""
    g = jnp.arange(verdict.tokens.shape[1])[None, :]
    stops = jnp.any(verdict.tokens[..., None] == stop_token_ids, axis=-1)
    to_stop = jnp.min(jnp.where(stops, g + 1, verdict.tokens.shape[1] + 1), axis=1)
    kept = jnp.minimum(jnp.minimum(verdict.accepted + 1, limit - length), to_stop)
    kept = jnp.where(open_, kept, 0)
    return kept, open_ & (kept == to_stop)


def _count(counts: Counts, draft: Draft, verdict: Verdict, appended, open_) -> Counts:
    g = jnp.arange(draft.tokens.shape[1])[None, :]
    # A draft cut by a stop token or a limit counts what was kept of it, any other counts whole.
    whole = appended == verdict.accepted + 1
    kept = jnp.where(open_, jnp.where(whole, draft.length, jnp.minimum(draft.length, appended)), 0)
    accepted = g < jnp.minimum(kept, verdict.accepted)[:, None]
    judged = g < jnp.minimum(kept, verdict.accepted + 1)[:, None]
    return Counts(
        rounds=counts.rounds + open_,
        drafted=counts.drafted + kept,
        accepted=counts.accepted + accepted,
        judged=counts.judged + judged,
        passes=counts.passes + 1,
    )
