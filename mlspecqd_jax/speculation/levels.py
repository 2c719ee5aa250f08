"""The recursion: levels, each a model and what drafts for it, and the one round that all of them share.

A round (`run_round`) takes a draft, scores it in one pass of the level's model, and appends 1 to draft_len + 1 tokens, each an
exact sample of that model. What a level puts out is therefore an exact sample of its own model whatever drafts below it, so a
level can itself draft for the level above: `Level.propose` runs rounds until the draft is full (ML-SpecQD, arXiv 2503.13565, for
any depth). Plain decoding is the level without a drafter: its draft is empty and its window is the pending token.

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

from mlspecqd_jax.speculation.buffers import put, read
from mlspecqd_jax.speculation.sampling import Sampling, adjust, log_probability
from mlspecqd_jax.speculation.verification import Draft, Verdict, verify

SLACK = 64  # buffer positions beyond the last token, for the window of one round of any level


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

    has_own_cache: bool  # here or in what drafts for it: then it is asked in every round, to be fed what was appended above

    def init(self, prompts: Sequences, prefill_width: int) -> Any:
        """Return the drafter's state, a cache of its own fed with all prompt tokens but the last."""

    def propose(
        self,
        state: Any,
        cache: Any,
        sequences: Sequences,
        sampling: Sampling,
        draft_len: int,
        limit: jax.Array,
        number: int,
        refed: int,
    ) -> tuple[Draft, Any, Any]:
        """Propose up to limit[r] <= draft_len tokens a row; return (draft, state, the verifier's cache).

        Args:
          state: the drafter's own state.
          cache: the verifier's cache, handed down for drafters that share it and handed back.
          sequences: what is committed so far, and drafted by the levels above.
          sampling: the rows' settings; the only noise is a function of its seeds, positions, levels and purposes.
          draft_len: static maximum G.
          limit: int32 [B], how many tokens are of use this round.
          number: how many levels above it there are. A cache of its own may lack as many tokens before the pending one, since
            each level above may have appended one that this drafter never ran.
          refed: how many tokens before the pending one the verifier feeds again this round. A drafter that shares its cache
            feeds these and must not write below them.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """A model, its parameters, and what drafts for it; a pytree whose leaves are the parameters of all levels below.

    The outermost level is the *stack* that the public functions take. Any other is a `Drafter`.
    """

    model: Model = dataclasses.field(metadata={"static": True})
    params: Any
    drafter: Drafter | None = None
    draft_len: int = dataclasses.field(metadata={"static": True}, default=0)
    # Every window is rounded up to a multiple of this many rows, so that stacks of any draft_len compute a row alike (exactness).
    window_multiple: int = dataclasses.field(metadata={"static": True}, default=1)
    # Whether to read the verifier's cache and to write the drafted positions there, where verification overwrites them.
    share_cache: bool = dataclasses.field(metadata={"static": True}, default=False)
    # Whatever a caller keeps with the level, such as its name and tokenizer; never read here.
    card: Hashable = dataclasses.field(metadata={"static": True}, default=None)

    def __post_init__(self):
        if (self.drafter is None) != (self.draft_len == 0) or self.draft_len < 0:
            raise ValueError(
                f"draft_len is {self.draft_len} {'without' if self.drafter is None else 'with'} a drafter; "
                "give both, or neither for plain decoding"
            )
        for number, level in enumerate(self.levels):
            if level.window(number) > SLACK:
                raise ValueError(
                    f"draft_len {level.draft_len} needs a window of {level.window(number)} positions; at most {SLACK} are supported"
                )
        if isinstance(self.drafter, Level) and self.drafter.share_cache and self.drafter.model != self.model:
            raise ValueError("a drafter can share its verifier's cache only if it is the same model with other weights")

    @property
    def levels(self) -> "tuple[Level, ...]":
        """This level and those below it, outermost first."""
        return (self, *(self.drafter.levels if isinstance(self.drafter, Level) else ()))

    @property
    def has_own_cache(self) -> bool:
        """Whether this level, as a drafter, or what drafts for it keeps a cache that must be fed what was appended above."""
        return not self.share_cache or (self.drafter is not None and self.drafter.has_own_cache)

    def window(self, refed: int = 0) -> int:
        """Return the number of positions that one round feeds to the model, `refed` of them for the second time."""
        return -(-(refed + self.draft_len + 1) // self.window_multiple) * self.window_multiple

    def init(self, prompts: Sequences, prefill_width: int) -> "LevelState":
        """Feed all prompt tokens but the last to every cache of this level and those below."""
        return self.feed(self.begin(prompts, prefill_width), prompts, prefill_width)

    def begin(self, prompts: Sequences, prefill_width: int) -> "LevelState":
        """Return empty caches for `feed`; what drafts and is no level is fed here."""
        batch, size = prompts.tokens.shape
        below = self.drafter
        if below is not None:
            below = (below.begin if isinstance(below, Level) else below.init)(prompts, prefill_width)
        cache = None if self.share_cache else self.model.init_cache(batch, size, self.params)
        return LevelState(cache, below, Counts.zeros(batch, self.draft_len))

    def feed(
        self,
        state: "LevelState",
        prompts: Sequences,
        prefill_width: int,
        first: jax.Array | int = 0,
        pieces: jax.Array | int | None = None,
    ) -> "LevelState":
        """Feed the prompts' pieces `first` to `first + pieces - 1` (None: all from `first` on) to every cache of levels."""
        cache, below = state.cache, state.below
        if not self.share_cache:
            cache = _fed(self, cache, prompts, prefill_width, first, pieces)
        if isinstance(self.drafter, Level):
            below = self.drafter.feed(below, prompts, prefill_width, first, pieces)
        return state._replace(cache=cache, below=below)

    def propose(self, state, cache, sequences, sampling, draft_len, limit, number, refed):
        """Run rounds until every row has limit[r] tokens or drafted a stop token (see `Drafter`)."""
        batch = sequences.length.shape[0]
        probs = jnp.zeros((batch, draft_len, sampling.vocab_size)) if sampling.rule == "rejection" else None
        limit = sequences.length + limit
        begun = Progress(
            tokens=sequences.tokens,
            length=sequences.length,
            begin=sequences.length,
            ended=jnp.zeros((batch,), bool),
            broken=jnp.zeros((batch,), bool),
            cache=cache if self.share_cache else state.cache,
            below=state.below,
            counts=state.counts,
            probs=probs,
            logprobs=None,
        )

        def run(progress, refed):
            return run_round(self, progress, limit, sampling, number, refed)

        refed = refed if self.share_cache else number
        if refed:
            begun = run(begun, refed)

        def more(progress):
            # A cache of its own, here or below, must catch up in every round of the verifier, also where no draft is of use.
            first = self.has_own_cache & (progress.counts.passes == state.counts.passes)
            return first | jnp.any(is_open(progress, limit))

        end = jax.lax.while_loop(more, lambda progress: run(progress, 0), begun)
        draft = Draft(read(end.tokens, end.begin, draft_len), end.probs, end.length - end.begin)
        if self.share_cache:
            return draft, LevelState(None, end.below, end.counts), end.cache
        return draft, LevelState(end.cache, end.below, end.counts), cache


class Counts(NamedTuple):
    """What happened to the drafts that a level judged, over unfinished rows."""

    rounds: jax.Array  # int32 [B]
    drafted: jax.Array  # int32 [B]
    accepted: jax.Array  # int32 [B, G], by position in the draft
    judged: jax.Array  # int32 [B, G]
    passes: jax.Array  # int32, passes of the level's model in rounds (prefill apart)

    @staticmethod
    def zeros(batch: int, draft_len: int) -> "Counts":
        """Return the counts before the first round."""
        zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
        return Counts(zeros((batch,)), zeros((batch,)), zeros((batch, draft_len)), zeros((batch, draft_len)), zeros(()))


class LevelState(NamedTuple):
    """What a level keeps between rounds of the level above it."""

    cache: Any  # None where it shares its verifier's
    below: Any  # its drafter's state
    counts: Counts


class Progress(NamedTuple):
    """Everything that a round of a level reads and writes."""

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]
    begin: jax.Array  # int32 [B], the length before the first round
    ended: jax.Array  # bool [B], whether the last token is a stop token
    broken: jax.Array  # bool [B], whether the target's logits after the last token are no numbers to choose by
    cache: Any
    below: Any  # the drafter's state
    counts: Counts
    probs: jax.Array | None  # f32 [B, G, V], what the tokens from `begin` on were drawn from: under the rejection rule, for a draft
    logprobs: jax.Array | None  # f32 [B, S], of the tokens chosen, when asked for


def is_open(progress: Progress, limit: jax.Array) -> jax.Array:
    """Return bool [B]: which rows have neither ended, nor broken, nor reached their limit."""
    return ~progress.ended & ~progress.broken & (progress.length < limit)


def run_round(level: Level, progress: Progress, limit: jax.Array, sampling: Sampling, number: int = 0, refed: int = 0) -> Progress:
    """Draft, score, verify: append 1 to draft_len + 1 tokens to every open row.

    Args:
      level: whose exact samples to append.
      progress: where the rows stand.
      limit: int32 [B], the length at which a row is finished.
      sampling: the rows' settings.
      number: how many levels above it there are.
      refed: how many tokens before the pending one to feed again (fewer where a row has fewer).
    """
    open_ = is_open(progress, limit)
    length, rows = progress.length, level.draft_len + 1
    draft, below, cache = _drafted(level, progress, limit, open_, sampling, number, refed)
    tokens = put(progress.tokens, length, draft.tokens)
    start = jnp.maximum(length - 1 - refed, 0)
    logits, cache = level.model(level.params, read(tokens, start, level.window(refed)), start, cache)
    logits = read(logits, length - 1 - start, rows) if refed else logits[:, :rows]
    logits = _fitted(logits, sampling.vocab_size)
    adjusted = adjust(logits, tokens, length[:, None] + jnp.arange(rows), sampling)
    verdict = verify(_lawful(adjusted) if number else adjusted, draft, length, sampling, number)
    appended, ended = _cut(verdict, length, limit, open_, sampling.stop_token_ids)
    broken = progress.broken
    if number == 0:  # a draft's are replaced by lawful ones
        lawful = _lawful_rows(adjusted, verdict, sampling)
        broken |= open_ & (lawful < appended)
        ended &= ~broken
        appended = jnp.minimum(appended, lawful)
    probs, logprobs = progress.probs, progress.logprobs
    if probs is not None:
        probs = put(probs, length - progress.begin, verdict.probs)
    if logprobs is not None:
        logprobs = put(logprobs, length, log_probability(logits, verdict.tokens))
    return Progress(
        tokens=put(tokens, length, verdict.tokens),
        length=length + appended,
        begin=progress.begin,
        ended=progress.ended | ended,
        broken=broken,
        cache=cache,
        below=below,
        counts=_count(progress.counts, draft, verdict, appended, open_),
        probs=probs,
        logprobs=logprobs,
    )


def piece_width(prefill_width: int, size: int) -> int:
    """Return the width of the pieces in which prompts are fed to a buffer of `size`: at most prefill_width, and they fill it."""
    return math.gcd(prefill_width, size)


def _fed(level: Level, cache: Any, prompts: Sequences, prefill_width: int, first, pieces) -> Any:
    """Return the level's cache after some pieces of all prompt tokens but the last."""
    batch, size = prompts.tokens.shape
    width = piece_width(prefill_width, size)
    first = jnp.asarray(first, jnp.int32)
    end = (jnp.max(prompts.length) - 1 + width - 1) // width
    if pieces is not None:
        end = jnp.minimum(end, first + pieces)

    def feed(i, cache):
        start = i * width
        window = jax.lax.dynamic_slice(prompts.tokens, (0, start), (batch, width))
        return level.model(level.params, window, jnp.full((batch,), start, jnp.int32), cache)[1]

    return jax.lax.fori_loop(first, end, feed, cache)


def _drafted(level, progress, limit, open_, sampling, number, refed):
    if level.drafter is None:
        return Draft.empty(open_.shape[0], sampling.vocab_size), progress.below, progress.cache
    # The token after the draft comes from the verifier, so one less than what is missing is of use.
    useful = jnp.where(open_, jnp.clip(limit - progress.length - 1, 0, level.draft_len), 0)
    if number == 0:
        useful = jnp.minimum(useful, sampling.draft_limit)
    sequences = Sequences(progress.tokens, progress.length)
    return level.drafter.propose(progress.below, progress.cache, sequences, sampling, level.draft_len, useful, number + 1, refed)


def _fitted(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Cut or pad a draft's logits with -inf to the target's vocabulary: models of one tokenizer pad it differently."""
    missing = max(vocab_size - logits.shape[-1], 0)
    return jnp.pad(logits[..., :vocab_size], ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)


def _lawful(logits: jax.Array) -> jax.Array:
    """Replace each row that nothing can be drawn from (NaN, +inf, or -inf throughout) by certainty of token 0.

    A broken draft must still hand up what it drew from; that it is never accepted costs speed alone.
    """
    usable = jnp.all(logits < jnp.inf, axis=-1) & jnp.any(logits > -jnp.inf, axis=-1)
    certain = jnp.where(jnp.arange(logits.shape[-1]) == 0, 0.0, -jnp.inf)
    return jnp.where(usable[..., None], logits, certain)


def _lawful_rows(logits: jax.Array, verdict: Verdict, sampling: Sampling) -> jax.Array:
    """Return int32 [B], how many leading rows of logits [B, W, V] can be chosen from: no NaN, no +inf, not -inf throughout.

    NaN and +inf come before every number in an argmax, so greedy tokens tell of them without another pass over V.
    """

    def of_chosen(logits):
        return jnp.take_along_axis(logits, verdict.tokens[..., None], axis=-1)[..., 0]

    def of_all(logits):
        return jnp.max(logits, axis=-1)

    if sampling.synthetic_acceptance is not None:
        largest = of_all(logits)
    else:
        largest = jax.lax.cond(jnp.any(sampling.temperature > 0), of_all, of_chosen, logits)
    return jnp.sum(jnp.cumprod(jnp.isfinite(largest).astype(jnp.int32), axis=1), axis=1)


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
