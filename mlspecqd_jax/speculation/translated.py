"""A scorer of other tokens as a scorer of the target's: what lets a model of another tokenizer draft.

Each token of the target is fed as the tokens that spell it, none, one or several, and what the scorer then expects next is read as
logits of the target's tokens: a token that means the same has the same logit, one without a counterpart -inf. The distribution is
thus the scorer's own over what both vocabularies have (token-level intersection; Timor et al., arXiv 2502.05202). Levels above and
below see the target's tokens alone, so that every rule, penalty and noise is as for any draft.

Notation: B batch, S slots of the target's buffer, W window, P the scorer's tokens fed at once, V the target's vocabulary, N tokens
that spell it, F features.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.arguments import LARGEST_INT
from mlspecqd_jax.speculation.buffers import read_at, write_at
from mlspecqd_jax.speculation.protocols import PADDING, Scored, Scorer, depends_of, experts_read

CACHE_BLOCK = 256  # positions


class Dictionary(NamedTuple):
    """From the target's tokens to the scorer's and back."""

    first: jax.Array  # int32 [V + 1]; ids[first[t] : first[t + 1]] spell token t
    ids: jax.Array  # int32 [N], the scorer's
    counterpart: jax.Array  # int32 [V], the scorer's token that means the same, or -1
    opening: jax.Array  # int32 [O], what the scorer is fed before a text


class TranslatedParams(NamedTuple):
    """The parameters of a `Translated` scorer."""

    scorer: Any  # the scorer's own
    dictionary: Dictionary


class TranslatedCache(NamedTuple):
    """What a `Translated` scorer remembers, by absolute positions of the target's tokens, and of the scorer's."""

    scorer: Any  # the scorer's own
    ends: jax.Array  # int32 [B, S], how many of the scorer's tokens spell the target's up to each position


@dataclasses.dataclass(frozen=True)
class Translated:
    """A `Scorer` of the target's tokens over one of others; its parameters are `TranslatedParams`.

    The scorer has to drop what a window writes beyond its cache, as a `Network` does. Where a row's text outgrows that cache, its
    logits are -inf from there on: nothing of it is accepted any more.
    """

    scorer: Scorer
    vocab_size: int  # V
    stretch: float = 1.0  # tokens of the scorer for one of the target, for which its cache has room
    max_positions: int = LARGEST_INT  # of the scorer

    def row_multiple(self, params: TranslatedParams) -> int:
        """Return the scorer's (see `Scorer`)."""
        return self.scorer.row_multiple(params.scorer)

    def depends(self, params: TranslatedParams) -> Any:
        """Return what the scorer's programs depend on beside their arguments (see `depends_of`)."""
        return depends_of(self.scorer, params.scorer)

    def init_cache(self, params: TranslatedParams, batch: int, slots: int) -> TranslatedCache:
        """Return an empty cache for `slots` of the target's tokens."""
        own = self.scorer.init_cache(params.scorer, batch, self._slots(slots, params))
        return TranslatedCache(own, jnp.zeros((batch, slots), jnp.int32))

    def experts_read(self, cache: TranslatedCache) -> jax.Array | None:
        """Return the scorer's (see `protocols.experts_read`)."""
        return experts_read(self.scorer, cache.scorer)

    def __call__(
        self, params: TranslatedParams, tokens: jax.Array, start: jax.Array, cache: TranslatedCache, *, features: bool = False
    ) -> Scored:
        """Feed what spells tokens [B, W], in as many passes of the scorer as the longest row needs (see `Scorer`)."""
        (batch, width), size = tokens.shape, _piece(tokens.shape[1])
        room = min(self._slots(cache.ends.shape[1], params), self.max_positions)
        spelling = _spell(params.dictionary, tokens, start)
        before = jnp.where(start > 0, read_at(cache.ends, jnp.maximum(start - 1, 0), 1)[:, 0], 0)  # [B]
        ends = before[:, None] + spelling.after
        total = jnp.minimum(spelling.after[:, -1], room - before)

        def run(first, own):
            window = _window(params.dictionary, spelling, first + jnp.arange(size), total)
            scored = self.scorer(params.scorer, window, jnp.minimum(before + first, room), own, features=features)
            return Scored(*scored)

        def feed(carry):
            first, own, found = carry
            scored = run(first, own)
            last = spelling.after - 1 - first  # [B, W], the row of this piece that ends each token, if one does
            here = ((last >= 0) & (last < size))[..., None]

            def filled(old, new):
                return jnp.where(here, jnp.take_along_axis(new, jnp.clip(last, 0, size - 1)[..., None], axis=1), old)

            return first + size, scored.cache, jax.tree.map(filled, found, (scored.logits, scored.features))

        shapes = jax.eval_shape(run, jnp.int32(0), cache.scorer)
        nothing = jax.tree.map(lambda x: jnp.zeros((batch, width, x.shape[-1]), x.dtype), (shapes.logits, shapes.features))
        begun = (jnp.int32(0), cache.scorer, nothing)
        _, own, (logits, hidden) = jax.lax.while_loop(lambda carry: carry[0] < jnp.max(total), feed, begun)
        # A token that is spelled by nothing, and comes first in the window, has the logits of a row that was fed before it.
        known = (spelling.after > 0) & (ends <= room)
        cache = TranslatedCache(own, write_at(cache.ends, start, ends))
        return Scored(_translate(params.dictionary, jnp.where(known[..., None], logits, -jnp.inf)), cache, hidden)

    def _slots(self, slots: int, params: TranslatedParams) -> int:
        """Return the size of the scorer's cache for so many slots of the target's: whole blocks, as the loop's buffers have."""
        wanted = min(math.ceil(slots * self.stretch) + params.dictionary.opening.shape[0], self.max_positions)
        return wanted + -wanted % CACHE_BLOCK


class _Spelling(NamedTuple):
    """Which of the scorer's tokens spell a window."""

    first: jax.Array  # int32 [B, W], in the dictionary
    opening: jax.Array  # int32 [B, W], how many come before these
    number: jax.Array  # int32 [B, W], how many there are with these
    after: jax.Array  # int32 [B, W], how many there are up to the end of each token


def _piece(width: int) -> int:
    """Return how many of the scorer's tokens are fed at once.

    A window of one token is mostly of one that the scorer chose itself, and that it spells as one. In wider windows some tokens are
    several of its own, and a few rows more cost less than a second pass.
    """
    return width + width // 2


def _spell(dictionary: Dictionary, tokens: jax.Array, start: jax.Array) -> _Spelling:
    known, at = tokens != PADDING, jnp.maximum(tokens, 0)
    begins = start[:, None] + jnp.arange(tokens.shape[1])[None, :] == 0
    opening = jnp.where(known & begins, dictionary.opening.shape[0], 0)
    first = dictionary.first[at]
    number = jnp.where(known, dictionary.first[at + 1] - first, 0) + opening
    return _Spelling(first, opening, number, jnp.cumsum(number, axis=1))


def _window(dictionary: Dictionary, spelling: _Spelling, at: jax.Array, total: jax.Array) -> jax.Array:
    """Return the scorer's tokens [B, P] at the offsets `at` [P] in what spells a window; `PADDING` from offset total[r] on."""
    width = spelling.after.shape[1]
    ended = jnp.sum(spelling.after[:, None, :] <= at[None, :, None], axis=-1)  # [B, P], how many tokens of the window
    w = jnp.minimum(ended, width - 1)

    def of_token(x):
        return jnp.take_along_axis(x, w, axis=1)

    nth = at[None, :] - of_token(spelling.after - spelling.number)  # of those that spell this token
    ids = dictionary.ids.at[of_token(spelling.first) + nth - of_token(spelling.opening)].get(mode="clip")
    if dictionary.opening.shape[0]:
        ids = jnp.where(nth < of_token(spelling.opening), dictionary.opening.at[nth].get(mode="clip"), ids)
    return jnp.where(at[None, :] < total[:, None], ids, PADDING)


def _translate(dictionary: Dictionary, logits: jax.Array) -> jax.Array:
    """Return logits [B, W, V] of the target's tokens, given those of the scorer's [B, W, its vocabulary]."""
    counterpart = dictionary.counterpart
    meant = jnp.take(logits, jnp.maximum(counterpart, 0), axis=-1)
    return jnp.where((counterpart >= 0)[None, None, :], meant, -jnp.inf)
