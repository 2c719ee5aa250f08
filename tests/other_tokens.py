"""Toys that read and score other tokens than a target's, and the dictionaries by which they draft for it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from toys import EMPTY, MODULUS, Toy, undefined_where_padded

from mlspecqd_jax.speculation.buffers import write_at
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.protocols import PADDING
from mlspecqd_jax.speculation.translated import Dictionary, Translated, TranslatedParams


def dictionary_of(spelled, counterpart=None, opening=()):
    """Return the dictionary of a list of spellings, one for each token of the target; what is spelled as one means the same."""
    alone = [own[0] if len(own) == 1 else -1 for own in spelled]
    flat = [i for own in spelled for i in own]
    numbers = (np.cumsum([0, *map(len, spelled)]), flat, alone if counterpart is None else counterpart, opening)
    return Dictionary(*(jnp.asarray(x, jnp.int32) for x in numbers))


def translated(scorer, params, dictionary, vocab_size, drafter=None, draft_len=0, share_cache=False, **settings):
    """Return the level of a scorer of other tokens."""
    model = Translated(scorer, vocab_size, **settings)
    return Level(model, TranslatedParams(params, dictionary), drafter, draft_len, share_cache=share_cache)


@dataclasses.dataclass(frozen=True)
class Renumbered:
    """A toy whose tokens have other ids, among `more` that it likes best: its token i is the toy's token order[i]."""

    toy: Toy
    order: tuple[int, ...]
    more: int = 0

    @property
    def vocab_size(self):
        return self.toy.vocab_size + self.more

    @property
    def dictionary(self):
        return dictionary_of([(self.order.index(t),) for t in range(self.toy.vocab_size)])

    def init_cache(self, params, batch, slots):
        return self.toy.init_cache(params, batch, slots)

    def row_multiple(self, params):
        return 1

    def __call__(self, params, tokens, start, cache, *, features=False):
        of_toy = jnp.where(tokens == PADDING, PADDING, jnp.asarray(self.order)[jnp.maximum(tokens, 0)])
        logits, cache, _ = self.toy(params, of_toy, start, cache)
        own = jnp.pad(logits[..., jnp.asarray(self.order)], ((0, 0), (0, 0), (0, self.more)), constant_values=100.0)
        return own, cache, None


@dataclasses.dataclass(frozen=True)
class Stuttering:
    """A toy whose tokens have other ids, V - t for its token t, and that skips its token 0 wherever it stands.

    What is spelled with any number of these reads the same.
    """

    toy: Toy

    @property
    def vocab_size(self):
        return self.toy.vocab_size + 1

    def spelled(self, before, silent=()):
        """Return the dictionary in which the toy's token t comes after before[t] of what is skipped; some are never meant."""
        meant = [self.toy.vocab_size - t for t in range(self.toy.vocab_size)]
        counterpart = [-1 if t in silent else own for t, own in enumerate(meant)]
        return dictionary_of([(0,) * n + (own,) for own, n in zip(meant, before, strict=True)], counterpart)

    def init_cache(self, params, batch, slots):
        return self.toy.init_cache(params, batch, slots)

    def row_multiple(self, params):
        return 1

    def __call__(self, params, tokens, start, cache, *, features=False):
        cache = write_at(cache, start, tokens)
        position = start[:, None] + jnp.arange(tokens.shape[1])[None, :]
        seen = jnp.arange(cache.shape[1])[None, None, :] <= position[..., None]  # [B, W, S]
        heard = cache != 0
        weight = jnp.asarray([pow(7, i, MODULUS) for i in range(cache.shape[1])], jnp.int32)
        of_toy = self.toy.vocab_size - cache
        term = jnp.where(heard, (of_toy + 1) * weight[jnp.maximum(jnp.cumsum(heard, axis=1) - 1, 0)] % MODULUS, 0)
        logits = params[jnp.sum(jnp.where(seen, term[:, None], 0), axis=-1) % MODULUS]
        unwritten = jnp.any(seen & (cache == EMPTY)[:, None], axis=-1)
        alarm = jnp.where(jnp.arange(self.toy.vocab_size) == self.toy.alarm, 1e6, 0.0)
        logits = jnp.where(unwritten[..., None], alarm[None, None, :], logits)[..., ::-1]
        logits = jnp.pad(logits, ((0, 0), (0, 0), (1, 0)), constant_values=100.0)
        return undefined_where_padded(logits, tokens), cache, None
