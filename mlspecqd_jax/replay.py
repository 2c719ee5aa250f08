"""What drafts of a twin would be worth, from one look at text that the target wrote: no more than a pass is compiled for it.

A draft is accepted up to its first token that is not what the target wrote, under the greedy and the coupled rule alike. So it is
enough to know, of each place of a text, whether the twin would choose the same there: rounds of any length can be played on that.

Notation: N tokens of a text, R rows of a pass.
"""

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlspecqd_jax import jax_settings
from mlspecqd_jax.generation import compiled, prefilled
from mlspecqd_jax.loading.model import Model
from mlspecqd_jax.programs import programs
from mlspecqd_jax.requests import request
from mlspecqd_jax.speculation import choosing
from mlspecqd_jax.speculation.buffers import padded
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.stack import Stack
from mlspecqd_jax.speculation.state import State

LONGEST = 15  # tokens of a draft, as where lengths are chosen
WINDOW = LONGEST + 1  # tokens that are judged in a row, each on the twin's own keys and values of those before it, as in a draft


class Written(NamedTuple):
    """A text that a target wrote, with its cache, and how tokens were chosen."""

    state: State
    sampling: Sampling
    level: Level | None = None  # that wrote it; needed where its cache does not hold all positions


class Read(NamedTuple):
    """What a model made of texts."""

    agreements: list[np.ndarray]  # bool [N] each, whether it would have chosen what the target wrote
    seconds: float  # of a pass over one row, the least of all tries, so that no compilation counts


@jax_settings.held
def write(plain: Stack, prompt: list[int], tokens: int, **arguments) -> Written:
    """Continue a prompt plainly by so many tokens; the arguments are those of `generate`."""
    asked = request(plain, [prompt], {"max_new_tokens": tokens, "stop_token_ids": (), **arguments})
    state = prefilled(plain, compiled(plain, asked)[0], asked.batch)
    state = programs(plain).advance(plain, state, np.array(asked.batch.limit), asked.sampling, np.int32(tokens))
    return Written(state, asked.sampling, plain.level)


@jax_settings.held
def read(model: Model, written: list[Written]) -> Read:
    """Let the target or a twin choose the new tokens of texts that are as long, each after those before it, and time its passes."""
    agreements, seconds = [], np.inf
    for text_of in written:
        state, sampling, _ = text_of
        begin, end = int(state.begin[0]), int(state.length[0])
        text = np.asarray(state.tokens)[0]
        found = []
        places = range(begin, end, WINDOW)
        for first, cache in zip(places, _caches(text_of, places), strict=True):
            start = jnp.asarray([first - 1], jnp.int32)
            began = time.perf_counter()
            choice = jax.block_until_ready(_choices(model.network, model.params, cache, state.tokens, start, sampling))
            seconds = min(seconds, (time.perf_counter() - began) / WINDOW)
            found.append(np.asarray(choice)[0] == text[first : first + WINDOW])
        agreements.append(np.concatenate(found)[: end - begin])
    return Read(agreements, float(seconds))


def _caches(written: Written, places: range) -> Iterator[Any]:
    """Yield, for each place of a text, a cache of the target that holds what is before the token before it."""
    (state, _, level), fed = written, 0
    if level is None or getattr(level.model, "reach", None) is None:
        yield from (state.cache for _ in places)
        return
    cache = level.model.init_cache(level.params, 1, state.tokens.shape[1])  # a state that was fed the end is before nothing else
    for place in places:
        while fed < place - 1:
            until = min(fed + WINDOW, place - 1)
            bounds = (jnp.asarray([at], jnp.int32) for at in (fed, until))
            cache = _fed(level.model, level.params, cache, state.tokens, *bounds)
            fed = until
        yield jax.block_until_ready(cache)


@functools.partial(jax.jit, static_argnames="scorer")
def _fed(scorer, params, cache, tokens, start, until):
    """Return the cache after the tokens from start [1] to until [1], at most WINDOW of them."""
    window = padded(jax.lax.dynamic_slice_in_dim(tokens, start[0], WINDOW, axis=1), start, until)
    return scorer(params, window, start, cache)[1]


@functools.partial(jax.jit, static_argnames="network")
def _choices(network, params, cache, tokens, start, sampling):
    """Return the choices for the places after `start` [1], int32 [1, WINDOW], by as many passes over one row."""

    def choose(i, carry):
        chosen, cache = carry
        place = start + i
        logits, cache, _ = network(params, jax.lax.dynamic_slice_in_dim(tokens, place[0], 1, axis=1), place, cache)
        noise = choosing.noise(sampling.seed, place[:, None] + 1, 0, choosing.DRAW)
        return jax.lax.dynamic_update_slice_in_dim(chosen, choosing.draw(logits, noise, sampling), i, axis=1), cache

    return jax.lax.fori_loop(0, WINDOW, choose, (jnp.zeros((1, WINDOW), jnp.int32), cache))[0]


def best_fixed(agreements: list[np.ndarray], target: np.ndarray, draft: float) -> float:
    """Return the speed over plain decoding of drafts of the best fixed length, 0 included.

    Args:
      agreements: bool [N] each, of `read`.
      target: f64 [R], the times of the target's passes by rows.
      draft: the time of the draft's pass over one row.
    """
    plain = sum(map(len, agreements)) * target[1]
    return max(plain / sum(_time(hits, length, target, draft) for hits in agreements) for length in range(LONGEST + 1))


def _time(hits: np.ndarray, length: int, target: np.ndarray, draft: float) -> float:
    """Return the time in which a text is written by drafts of a fixed length."""
    wrong = np.append(np.flatnonzero(~hits), len(hits))  # places
    place, time = 0, 0.0
    while place < len(hits):
        drafted = min(length, len(hits) - place - 1)
        time += target[drafted + 1] + drafted * draft
        place += min(int(wrong[np.searchsorted(wrong, place)]) - place, drafted) + 1
    return time
