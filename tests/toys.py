"""Toy models and drafters whose truth is known, and the stacks and buffers of them: what the algorithm is proved on.

Notation: B batch, S buffer length, W window, G draft_len, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from compiling import quick_jit

from mlspecqd_jax.arguments import LARGEST_INT
from mlspecqd_jax.speculation.buffers import write_at
from mlspecqd_jax.speculation.choosing import DRAW, draw, noise, probabilities
from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.loop import generate_tokens
from mlspecqd_jax.speculation.protocols import PADDING, Ask, Draft, Lent
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.state import counts_of

MODULUS = 1009
EMPTY = PADDING  # so that an entry that a row of padding wrote is as good as none


def undefined_where_padded(logits, tokens):
    """What a pass makes of a row that only pads is anything (C13): here NaN, which whatever reads it passes on."""
    return jnp.where((tokens == PADDING)[..., None], jnp.nan, logits)


run = quick_jit(generate_tokens, static_argnames="prefill_width")


@quick_jit
def jit_choose(logits, t, level, purpose, sampling):
    """Choose from logits [B or 1, W, V] at the indices t [W]; level and purpose are traced, for a single compilation."""
    t = jnp.broadcast_to(t, (len(sampling.seed), len(t)))
    return draw(jnp.broadcast_to(logits, (*t.shape, logits.shape[-1])), noise(sampling.seed, t, level, purpose), sampling)


@dataclasses.dataclass(frozen=True)
class Toy:
    """A `Model` that reads only its cache: logits = table[hash of the last `order` tokens], params = table f32 [MODULUS, V].

    Its last token id is an alarm, which no table ever gives a chance: it is chosen only where an entry of the cache was read that
    nobody had written.
    """

    vocab_size: int = 8
    order: int = 10**6

    @property
    def alarm(self):
        return self.vocab_size - 1

    def table(self, seed, scale=2.0):
        table = scale * np.random.default_rng(seed).normal(size=(MODULUS, self.vocab_size))
        table[:, self.alarm] = -60
        return jnp.asarray(table, jnp.float32)

    def init_cache(self, params, batch, slots):
        return jnp.full((batch, slots), EMPTY, jnp.int32)

    def row_multiple(self, params):
        return 1

    def __call__(self, params, tokens, start, cache, *, features=False):
        cache = write_at(cache, start, tokens)
        logits = self.score(params, cache, start[:, None] + jnp.arange(tokens.shape[1])[None, :])
        return undefined_where_padded(logits, tokens), cache, None

    def score(self, params, cache, position):
        """Return the logits [B, W, V] that the cached tokens [B, S] up to each position [B, W] give."""
        slots = jnp.arange(cache.shape[1])[None, None, :]
        seen = (slots <= position[..., None]) & (slots > position[..., None] - self.order)  # [B, W, S]
        weight = jnp.asarray([pow(7, i, MODULUS) for i in range(cache.shape[1])], jnp.int32)
        known = jnp.sum(jnp.where(seen, ((cache + 1) * weight[None, :] % MODULUS)[:, None], 0), axis=-1)
        unwritten = jnp.any(seen & (cache == EMPTY)[:, None], axis=-1)
        alarm = 1e6 * jax.nn.one_hot(self.alarm, self.vocab_size)
        return jnp.where(unwritten[..., None], alarm, params[known % MODULUS])

    def truth(self, table, tokens):
        """Return the logits f32 [V] after a list of tokens, in plain Python."""
        first = max(len(tokens) - self.order, 0)
        return np.asarray(table)[sum((tokens[i] + 1) * pow(7, i, MODULUS) for i in range(first, len(tokens))) % MODULUS]


@dataclasses.dataclass(frozen=True)
class Markov:
    """A light `Model` that reads only the last `order` entries of its cache; params = table f32 [(V + 1) ** order, V]."""

    vocab_size: int = 4
    order: int = 2

    def table(self, seed, scale=1.0):
        shape = ((self.vocab_size + 1) ** self.order, self.vocab_size)
        return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)

    def init_cache(self, params, batch, slots):
        return jnp.full((batch, slots), EMPTY, jnp.int32)

    def row_multiple(self, params):
        return 1

    def __call__(self, params, tokens, start, cache, *, features=False):
        cache = write_at(cache, start, tokens)
        context = 0
        for i in range(self.order):
            at = start[:, None] + jnp.arange(tokens.shape[1])[None, :] - i
            last = jnp.take_along_axis(cache, jnp.clip(at, 0, cache.shape[1] - 1), axis=1)
            context += jnp.where(at < 0, 0, last + 1) * (self.vocab_size + 1) ** i
        return undefined_where_padded(params[context], tokens), cache, None

    def truth(self, table, tokens):
        """Return the logits f32 [V] after a list of tokens, in plain Python."""
        last = [*[EMPTY] * self.order, *tokens][::-1]
        return np.asarray(table)[sum((last[i] + 1) * (self.vocab_size + 1) ** i for i in range(self.order))]


@dataclasses.dataclass(frozen=True)
class SharedToy:
    """A `Toy` whose cache entries bear the mark of who wrote them; params = (table, mark).

    The owner of a cache has mark 0, a twin that shares it the mark of its verifier plus one. Whoever reads an entry of a higher
    mark than its own sounds the alarm. So a draft that writes below its verifier's window is heard.
    """

    toy: Toy = Toy()

    @property
    def vocab_size(self):
        return self.toy.vocab_size

    def init_cache(self, params, batch, slots):
        return self.toy.init_cache(params, batch, slots)

    def row_multiple(self, params):
        return 1

    def __call__(self, params, tokens, start, cache, *, features=False):
        table, mark = params
        marked = jnp.where(tokens == PADDING, EMPTY, tokens + self.vocab_size * mark)
        cache = write_at(cache, start, marked)
        foreign = cache >= self.vocab_size * (mark + 1)
        read = jnp.where(foreign | (cache == EMPTY), EMPTY, cache % self.vocab_size)
        logits = self.toy.score(table, read, start[:, None] + jnp.arange(tokens.shape[1])[None, :])
        return undefined_where_padded(logits, tokens), cache, None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Script:
    """A `Drafter` that proposes tokens[r, t] for index t of row r, certain of each; `length` of them at most."""

    name = "script"
    must_follow = uses_features = False

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]
    vocab_size: int = dataclasses.field(metadata={"static": True})
    heeds_limit: bool = dataclasses.field(metadata={"static": True}, default=True)

    def init(self, batch, slots):
        return jnp.zeros((batch,), jnp.int32)  # rounds that it was asked

    def feed(self, state, tokens, start, lent):
        return state

    def propose(self, state, ask, sampling):
        at = ask.sequences.length[:, None] + jnp.arange(ask.draft_len)[None, :]
        tokens = jnp.take_along_axis(self.tokens, at, axis=1, mode="clip")
        probs = jax.nn.one_hot(tokens, self.vocab_size) if sampling.rule == "rejection" else None
        length = jnp.minimum(ask.wanted, self.length) if self.heeds_limit else self.length
        return Draft(tokens, probs, length), state + 1, ask.lent


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyDrafter:
    """A `Drafter` that draws from another toy's table, without a cache of its own."""

    name = "toy"
    must_follow = uses_features = False

    params: jax.Array
    model: Toy = dataclasses.field(metadata={"static": True})

    def init(self, batch, slots):
        return None

    def feed(self, state, tokens, start, lent):
        return None

    def propose(self, state, ask, sampling):
        sequences = ask.sequences
        coupled = sampling.rule == "coupled"

        def one(tokens, g):
            t = sequences.length[:, None] + g
            logits = self.model.score(self.params, tokens, t - 1)
            drawn = draw(logits, noise(sampling.seed, t, 0 if coupled else 1, DRAW), sampling)
            return write_at(tokens, t[:, 0], drawn), (drawn[:, 0], probabilities(logits, sampling)[:, 0])

        _, (drawn, probs) = jax.lax.scan(one, sequences.tokens, jnp.arange(ask.draft_len))
        return Draft(drawn.T, None if coupled else jnp.swapaxes(probs, 0, 1), ask.wanted), state, ask.lent


def level(toy, table, drafter=None, draft_len=0, window_multiple=1):
    return Level(toy, table, drafter, draft_len, window_multiple)


def chain(names, tables, draft_lens, model):
    """Build a stack of one model with other parameters at each level.

    Args:
      names: what is below the target, such as "own>shared>ngram", outermost first; "" for plain decoding.
      tables: one for each level with a model, the target first.
      draft_lens: one for each name.
      model: of all levels; a `SharedToy` gets the marks that tell its levels apart.
    """
    names = ["target", *filter(None, names.split(">"))]
    marks = [0]
    for name in names[1:]:
        marks.append(marks[-1] + 1 if name == "shared" else 0)
    drafter = None
    for i, draft_len in reversed(list(enumerate([*draft_lens, 0]))):
        if names[i] == "ngram":
            drafter = PromptLookup()
        else:
            params = (tables[i], jnp.int32(marks[i])) if isinstance(model, SharedToy) else tables[i]
            drafter = Level(model, params, drafter, draft_len, share_cache=names[i] == "shared")
    return drafter


def ask_of(sequences, wanted, draft_len, cache=None, below=0):
    """Return what a target without features asks of its drafter, where `below` levels under that may draft all they can."""
    batch = len(sequences.length)
    lent = Lent(cache, None, jnp.zeros((batch,), jnp.int32))
    limits, fed = jnp.full((below, batch), LARGEST_INT, jnp.int32), jnp.asarray(sequences.length) - 1
    return Ask(sequences, wanted, limits, lent, draft_len, depth=1, fed=fed, refeed=0)


def ragged(prompts, size, filler=0):
    """Lay lists of tokens out as (tokens [B, size], length [B]); what lies beyond a prompt is `filler`."""
    tokens = np.full((len(prompts), size), filler, np.int32)
    for r, prompt in enumerate(prompts):
        tokens[r, : len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32)


def rows(tokens, length):
    """Return the rows of a buffer as lists, each up to its length."""
    return [row[:n].tolist() for row, n in zip(np.asarray(tokens), np.asarray(length), strict=True)]


PER_BATCH = ("stop_token_ids", "synthetic_acceptance", "vocab_size", "rule", "logprobs")


def pick_rows(sampling: Sampling, index):
    """Return the settings of the rows in `index`, a slice or a list."""
    index = index if isinstance(index, slice) else np.asarray(index)
    per_row = [f.name for f in dataclasses.fields(sampling) if f.name not in PER_BATCH and getattr(sampling, f.name) is not None]
    return dataclasses.replace(sampling, **{name: getattr(sampling, name)[index] for name in per_row})


def logprob_rows(state):
    """Return the log-probabilities of each row's new tokens, as lists."""
    begin, end = np.asarray(state.begin), np.asarray(state.length)
    return [row[b:e].tolist() for row, b, e in zip(np.asarray(state.logprobs), begin, end, strict=True)]


def level_counts(state):
    """Return the counts of all levels as numpy arrays, outermost first."""
    return jax.tree.map(np.asarray, list(counts_of(state)))
