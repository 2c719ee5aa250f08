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
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.speculation.buffers import read_at, write_at
from mlspecqd_jax.speculation.choosing import adjust, log_probability
from mlspecqd_jax.speculation.counts import Counts, count
from mlspecqd_jax.speculation.protocols import Draft, Drafter, Scorer, Sequences, check_draft, check_logits
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.verification import Verdict, verify

SLACK = 64  # buffer positions beyond the last token, for the window of one round of any level


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """A model, its parameters, and what drafts for it; a pytree whose leaves are the parameters of all levels below.

    The outermost level is the *stack* that the public functions take. Any other is a `Drafter`.
    """

    model: Scorer = dataclasses.field(metadata={"static": True})
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
            raise InputError(
                f"draft_len is {self.draft_len} {'without' if self.drafter is None else 'with'} a drafter; "
                "give both, or neither for plain decoding"
            )
        for depth, level in enumerate(self.levels):
            if level.window(depth) > SLACK:
                raise InputError(
                    f"draft_len {level.draft_len} needs a window of {level.window(depth)} positions; at most {SLACK} are supported"
                )
        if isinstance(self.drafter, Level) and self.drafter.share_cache and self.drafter.model != self.model:
            raise InputError("a drafter can share its verifier's cache only if it is the same model with other weights")

    @property
    def levels(self) -> "tuple[Level, ...]":
        """This level and those below it, outermost first."""
        return (self, *(self.drafter.levels if isinstance(self.drafter, Level) else ()))

    @property
    def must_follow(self) -> bool:
        """Whether this level, as a drafter, or what drafts for it keeps a cache that must be fed what was appended above."""
        return not self.share_cache or (self.drafter is not None and self.drafter.must_follow)

    def window(self, refeed: int = 0) -> int:
        """Return the depth of positions that one round feeds to the model, `refeed` of them for the second time."""
        return -(-(refeed + self.draft_len + 1) // self.window_multiple) * self.window_multiple

    def init(self, prompts: Sequences, prefill_width: int) -> "DrafterState":
        """Feed all prompt tokens but the last to every cache of this level and those below."""
        return self.feed(self.begin(prompts, prefill_width), prompts, prefill_width)

    def begin(self, prompts: Sequences, prefill_width: int) -> "DrafterState":
        """Return empty caches for `feed`; what drafts and is no level is fed here."""
        batch, size = prompts.tokens.shape
        below = self.drafter
        if below is not None:
            below = (below.begin if isinstance(below, Level) else below.init)(prompts, prefill_width)
        cache = None if self.share_cache else self.model.init_cache(batch, size, self.params)
        return DrafterState(cache, below, Counts.zeros(batch, self.draft_len))

    def feed(
        self,
        state: "DrafterState",
        prompts: Sequences,
        prefill_width: int,
        first: jax.Array | int = 0,
        pieces: jax.Array | int | None = None,
    ) -> "DrafterState":
        """Feed the prompts' pieces `first` to `first + pieces - 1` (None: all from `first` on) to every cache of levels."""
        cache, below = state.cache, state.below
        if not self.share_cache:
            cache = _fed(self, cache, prompts, prefill_width, first, pieces)
        if isinstance(self.drafter, Level):
            below = self.drafter.feed(below, prompts, prefill_width, first, pieces)
        return state._replace(cache=cache, below=below)

    def propose(self, state, cache, sequences, sampling, draft_len, wanted, depth, refeed):
        """Run rounds until every row has wanted[r] tokens or drafted a stop token (see `Drafter`)."""
        batch = sequences.length.shape[0]
        probs = jnp.zeros((batch, draft_len, sampling.vocab_size)) if sampling.rule == "rejection" else None
        limit = sequences.length + wanted
        begun = State(
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

        def run(progress, refeed):
            return run_round(self, progress, limit, sampling, depth, refeed)

        refeed = refeed if self.share_cache else depth
        if refeed:
            begun = run(begun, refeed)

        def more(progress):
            # A cache of its own, here or below, must catch up in every round of the verifier, also where no draft is of use.
            first = self.must_follow & (progress.counts.passes == state.counts.passes)
            return first | jnp.any(is_unfinished(progress, limit))

        end = jax.lax.while_loop(more, lambda progress: run(progress, 0), begun)
        draft = Draft(read_at(end.tokens, end.begin, draft_len), end.probs, end.length - end.begin)
        if self.share_cache:
            return draft, DrafterState(None, end.below, end.counts), end.cache
        return draft, DrafterState(end.cache, end.below, end.counts), cache


class DrafterState(NamedTuple):
    """What a level keeps between rounds of the level above it."""

    cache: Any  # None where it shares its verifier's
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
    below: Any  # the drafter's state
    counts: Counts
    probs: jax.Array | None  # f32 [B, G, V], what the tokens from `begin` on were drawn from: under the rejection rule, for a draft
    logprobs: jax.Array | None  # f32 [B, S], of the tokens chosen, when asked for


def is_unfinished(progress: State, limit: jax.Array) -> jax.Array:
    """Return bool [B]: which rows have neither ended, nor broken, nor reached their limit."""
    return ~progress.ended & ~progress.broken & (progress.length < limit)


def run_round(level: Level, progress: State, limit: jax.Array, sampling: Sampling, depth: int = 0, refeed: int = 0) -> State:
    """Draft, score, verify: append 1 to draft_len + 1 tokens to every open row.

    Args:
      level: whose exact samples to append.
      progress: where the rows stand.
      limit: int32 [B], the length at which a row is finished.
      sampling: the rows' settings.
      depth: how many levels above it there are.
      refeed: how many tokens before the pending one to feed again (fewer where a row has fewer).
    """
    unfinished = is_unfinished(progress, limit)
    length, rows = progress.length, level.draft_len + 1
    draft, below, cache = _drafted(level, progress, limit, unfinished, sampling, depth, refeed)
    tokens = write_at(progress.tokens, length, draft.tokens)
    start = jnp.maximum(length - 1 - refeed, 0)
    window = read_at(tokens, start, level.window(refeed))
    logits, cache = level.model(level.params, window, start, cache)
    check_logits(logits, level.model, window)
    logits = read_at(logits, length - 1 - start, rows) if refeed else logits[:, :rows]
    logits = _fitted(logits, sampling.vocab_size)
    adjusted = adjust(logits, tokens, length[:, None] + jnp.arange(rows), sampling)
    verdict = verify(_lawful(adjusted) if depth else adjusted, draft, length, sampling, depth)
    appended, ended = _cut(verdict, length, limit, unfinished, sampling.stop_token_ids)
    broken = progress.broken
    if depth == 0:  # a draft's are replaced by lawful ones
        lawful = _lawful_rows(adjusted, verdict, sampling)
        broken |= unfinished & (lawful < appended)
        ended &= ~broken
        appended = jnp.minimum(appended, lawful)
    probs, logprobs = progress.probs, progress.logprobs
    if probs is not None:
        probs = write_at(probs, length - progress.begin, verdict.probs)
    if logprobs is not None:
        logprobs = write_at(logprobs, length, log_probability(logits, verdict.tokens))
    return State(
        tokens=write_at(tokens, length, verdict.tokens),
        length=length + appended,
        begin=progress.begin,
        ended=progress.ended | ended,
        broken=broken,
        cache=cache,
        below=below,
        counts=count(progress.counts, draft, verdict, appended, unfinished),
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


def _drafted(level, progress, limit, unfinished, sampling, depth, refeed):
    if level.drafter is None:
        return Draft.empty(unfinished.shape[0], sampling.vocab_size), progress.below, progress.cache
    # The token after the draft comes from the verifier, so one less than what is missing is of use.
    useful = jnp.where(unfinished, jnp.clip(limit - progress.length - 1, 0, level.draft_len), 0)
    if depth == 0:
        useful = jnp.minimum(useful, sampling.draft_limit)
    sequences = Sequences(progress.tokens, progress.length)
    draft, *handed_back = level.drafter.propose(
        progress.below, progress.cache, sequences, sampling, level.draft_len, useful, depth + 1, refeed
    )
    return check_draft(draft, level.drafter, level.draft_len, sampling), *handed_back


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

    NaN and +inf come before every depth in an argmax, so greedy tokens tell of them without another pass over V.
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


def _cut(verdict: Verdict, length, limit, unfinished, stop_token_ids):
    """Return how many of the verdict's tokens each row keeps, and whether the last kept one is a stop token."""
    g = jnp.arange(verdict.tokens.shape[1])[None, :]
    stops = jnp.any(verdict.tokens[..., None] == stop_token_ids, axis=-1)
    to_stop = jnp.min(jnp.where(stops, g + 1, verdict.tokens.shape[1] + 1), axis=1)
    kept = jnp.minimum(jnp.minimum(verdict.accepted + 1, limit - length), to_stop)
    kept = jnp.where(unfinished, kept, 0)
    return kept, unfinished & (kept == to_stop)
