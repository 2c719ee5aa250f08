"""Models that play what is given: texts that a target writes, what its drafts choose from every place of them, and by what lead.

The autopilot is judged on these: they are as fast as tables, and what they choose depends on nothing but the place.

Notation: R texts, N new tokens, G tokens of a draft, L levels.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from toys import quick_jit

from mlspecqd_jax.speculation.autopilot import Autopilot
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.drafters.either import Either
from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.loop import advance, finished, generate_tokens, init
from mlspecqd_jax.speculation.priors import MIDDLES
from mlspecqd_jax.speculation.settings import Sampling

TARGET, TWIN, SMALL = range(3)
WIDTH = 64  # of the pieces in which prompts are fed
OUTER, INNER = 15, 7  # draft_lens


class Played(NamedTuple):
    """What is played of R texts: prompts, then N tokens each."""

    text: np.ndarray  # int32 [R, S]
    begin: np.ndarray  # int32 [R]
    twin: np.ndarray  # int32 [R, N, G], the twin's choices from each place on, on the target's cache up to there
    twin_lead: np.ndarray  # f32 [R, N, G]
    small: np.ndarray | None  # int32 [R, S], the small draft's choice for each place
    small_lead: np.ndarray | None  # f32 [R, S]

    @property
    def new(self) -> int:
        """N."""
        return self.twin.shape[1]

    def rows(self, index) -> "Played":
        """Return some of the texts."""
        return Played(*(None if part is None else part[index] for part in self))


@dataclasses.dataclass(frozen=True)
class Player:
    """A `Scorer` of a role; its cache holds where the draft began that it is in, which a pass of the target forgets."""

    vocab_size: int

    def row_multiple(self, params):
        return 1

    def init_cache(self, params, batch, slots):
        return jnp.full((batch,), -1, jnp.int32)

    def __call__(self, params, tokens, start, cache, *, features=False):
        role, played = params
        begun = jnp.where(cache < 0, start + 1, cache)
        place = start[:, None] + jnp.arange(tokens.shape[1])[None, :] + 1  # of what is decided
        r = jnp.arange(len(tokens))[:, None]
        row = jnp.clip(begun - played.begin, 0, played.twin.shape[1] - 1)[:, None]
        offset = jnp.clip(place - begun[:, None], 0, played.twin.shape[2] - 1)
        place = jnp.clip(place, 0, played.text.shape[1] - 1)
        choices = [played.text[r, place], played.twin[r, row, offset]]
        leads = [jnp.full(place.shape, 50.0), played.twin_lead[r, row, offset]]
        if played.small is not None:
            choices.append(played.small[r, place])
            leads.append(played.small_lead[r, place])
        token = jax.lax.select_n(jnp.broadcast_to(role, place.shape), *choices)
        lead = jax.lax.select_n(jnp.broadcast_to(role, place.shape), *leads)
        chosen, next_ = (jax.nn.one_hot(x, self.vocab_size) > 0 for x in (token, (token + 1) % self.vocab_size))
        logits = jnp.where(chosen, lead[..., None], jnp.where(next_, 0.0, -1000.0)).astype(jnp.float32)
        return logits, jnp.where(role == TARGET, -1, begun), None


def stack_of(played, vocab_size):
    """Return the target over look-up or its twin, which is over look-up, or over that or a small draft."""
    model, played = Player(vocab_size), jax.tree.map(jnp.asarray, played)
    inner = PromptLookup() if played.small is None else Either(Level(model, (jnp.int32(SMALL), played)))
    twin = Level(model, (jnp.int32(TWIN), played), inner, INNER, share_cache=True)
    return Level(model, (jnp.int32(TARGET), played), Either(twin), OUTER, widths=(1,))


@quick_jit
def _run(stack, tokens, length, limit, control):
    sampling = Sampling.create(len(length), stack.model.vocab_size)
    return generate_tokens(stack, tokens, length, limit, sampling, control=control, prefill_width=WIDTH)


@quick_jit
def _run_cut(stack, tokens, length, limit, control, rounds):
    sampling = Sampling.create(len(length), stack.model.vocab_size)
    state = init(stack, tokens, length, sampling, control=control, prefill_width=WIDTH)

    def more(state):
        return ~jnp.all(finished(state, limit))

    state = jax.lax.while_loop(more, lambda state: advance(stack, state, limit, sampling, rounds), state)
    return state.tokens, state.length, state


def play(played, vocab_size, control: Autopilot, rounds: int | None = None):
    """Play all texts as one batch under a control, in calls of so many rounds; return the state.

    Its tokens are checked to be the texts'.
    """
    size = -(-(int(played.begin.max()) + played.new + SLACK) // WIDTH) * WIDTH
    prompt = np.arange(size)[None, :] < played.begin[:, None]
    text = np.pad(played.text, ((0, 0), (0, max(size - played.text.shape[1], 0))))[:, :size]
    length = jnp.asarray(played.begin, jnp.int32)
    given = stack_of(played, vocab_size), jnp.asarray(np.where(prompt, text, 0), jnp.int32), length, length + played.new, control
    tokens, length, state = _run(*given) if rounds is None else _run_cut(*given, jnp.int32(rounds))
    for r, begin in enumerate(played.begin):
        assert np.array_equal(tokens[r, begin : length[r]], text[r, begin : begin + played.new])
    return state


def recorded(path) -> "dict[str, tuple[Played, int]]":
    """Return the sets of `benchmarks/record_traces.py`, tokens renumbered from 0, each with its number of tokens."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file}
    return {
        name: _recorded({key: arrays[f"{name}/{key}"] for key in _KEYS if f"{name}/{key}" in arrays}) for name in _names(arrays)
    }


_KEYS = ("text", "begin", "hit", "twin", "small", "small_class")


def _names(arrays):
    return dict.fromkeys(key.partition("/")[0] for key in arrays)


def _recorded(a):
    leads = np.array(MIDDLES, np.float32)
    begin, shape = a["begin"].astype(np.int32), a["twin"].shape
    place = begin[:, None, None] + np.arange(shape[1])[None, :, None] + np.arange(shape[2])[None, None, :]
    r = np.arange(shape[0])
    _, text = np.unique(a["text"], return_inverse=True)
    text = text.reshape(a["text"].shape).astype(np.int32)
    wrong = int(text.max()) + 1  # a token that no text has
    hit = np.unpackbits(a["hit"])[: np.prod(shape)].reshape(shape).astype(bool)
    twin = np.where(hit, text[r[:, None, None], place], wrong).astype(np.int32)
    small = small_lead = None
    if "small" in a:
        known = a["text"][r[:, None], place[:, :, 0]]
        small, small_lead = np.full(text.shape, wrong, np.int32), np.zeros(text.shape, np.float32)
        small[r[:, None], place[:, :, 0]] = np.where(a["small"] == known, text[r[:, None], place[:, :, 0]], wrong)
        small_lead[r[:, None], place[:, :, 0]] = leads[a["small_class"]]
    return Played(text, begin, twin, leads[a["twin"]], small, small_lead), wrong + 2
