"""What passes take on this machine: measured by the very program that generates, with drafts of forced lengths.

A round's seconds are those of its passes, so that rounds of several lengths give the time of a pass of each level by rows in use,
by least squares: piecewise linear in the rows, and never less for more of them. Drafts of look-up tell a verifier's passes from
those of a model that drafts for it, and rounds in which nothing that is found seems to pay what asking takes. Of several tries the
shortest counts: whatever else the machine does only adds to it; and a call of one plain round is taken off, since calls take time
of their own. Text is greedy: choosing by chance takes its time in each row, so that sampled runs are a little slower than by the
table.

Notation: L levels, D levels that draft.
"""

import dataclasses
import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlspecqd_jax import jax_settings
from mlspecqd_jax.generation import compiled, prefilled
from mlspecqd_jax.programs import programs
from mlspecqd_jax.requests import Request, request
from mlspecqd_jax.speculation.autopilot import Autopilot
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.guide import CLASSES, LOOKUP, MODEL
from mlspecqd_jax.speculation.stack import Stack
from mlspecqd_jax.speculation.state import State, counts_of

KNOTS = (1, 2, 4, 8, 16)  # rows
OUTER, INNER = (1, 3, 7, 15), (3, 7)  # forced lengths; inner ones under the longest
ROUNDS, SLOW_ROUNDS = 8, 2  # of a length at once, of which the first find nothing in the processor's caches; of slow models
PLAIN_ROUNDS = 15  # of none; after more of these a model is tried whatever seems to pay
SLOW = 0.02  # seconds of a plain round
PERIOD = 16  # tokens that repeat, so that look-up finds as many
LEAST, MOST = 3, 30  # times that each is tried
CERTAIN = 0.999 * 1e6, 1e6  # accepted and judged: so many that what rounds add says nothing


class Measured(NamedTuple):
    """What was measured."""

    times: np.ndarray  # f64 [L, SLACK + 1], in passes of the target over one row
    asking: float  # what a round takes beyond a plain one if a draft is asked for and there is none, in the same
    plain: float  # seconds of a round of plain decoding
    seconds: float  # that measuring took, compilation apart


@jax_settings.held
def measure(stack: Stack, prompt: list[int], *, budget: float = 2.0, **arguments) -> Measured:
    """Time rounds of a stack with lengths="auto" after a prompt, one row of which is enough.

    Args:
      stack: whose program it is.
      prompt: token ids; what follows them is thrown away.
      budget: seconds after which no more is tried than the least.
      **arguments: of `generate`, such as the temperature: what changes the program or its work.
    """
    settings = {"max_new_tokens": ROUNDS * (max(OUTER) + 1) + 1, "stop_token_ids": (), **arguments}
    asked = request(stack, [_repeating(prompt, stack.level.model.vocab_size)], settings)
    state, _ = compiled(stack, asked)
    state = jax.block_until_ready(prefilled(stack, state, asked.batch))
    began = time.perf_counter()
    once, plain, *others = _forced(stack, ROUNDS)
    if _rounds(stack, asked, state, once)[1] > SLOW:  # the longest drafts would take more than the budget
        others = [each._replace(rounds=SLOW_ROUNDS) for each in others if each.caps[0] <= min(7, stack.level.draft_len)]
    in_vain = plain._replace(caps=others[0].caps, pays=False)
    passes: dict[_Forced, np.ndarray] = {}
    seconds: dict[_Forced, float] = {}
    for i in range(MOST):
        if i >= LEAST and time.perf_counter() - began > budget:
            break
        for each in (once, plain, in_vain, *others):  # in turn, so that what else the machine does falls on all of them
            passes[each], spent = _rounds(stack, asked, state, each)
            seconds[each] = min(spent, seconds.get(each, np.inf))
    solved = (plain, *others)
    times = _solved(
        np.array([passes[each] - passes[once] for each in solved]),
        np.array([seconds[each] - seconds[once] for each in solved]),
    )
    asking = max(seconds[in_vain] - seconds[plain], 0) / (PLAIN_ROUNDS * times[0, 1])
    return Measured(times / times[0, 1], float(asking), float(times[0, 1]), time.perf_counter() - began)


class _Forced(NamedTuple):
    """What rounds have to draft: by which source for the target, at most how many tokens each level, and how many rounds."""

    source: int
    caps: tuple[int, ...]  # outermost first
    rounds: int
    pays: bool = True  # else nothing is drafted, although it is asked for


def _forced(stack: Stack, several: int) -> list[_Forced]:
    """Return one round of the target alone, several, rounds of look-up, of a model alone, and of one with what drafts for it."""
    inner = len(stack.level.draft_lens) - 1
    outer = [n for n in OUTER if 0 < n <= stack.level.draft_len]
    found = [_Forced(LOOKUP, (0,) * (1 + inner), rounds) for rounds in (1, PLAIN_ROUNDS)]
    found += [_Forced(LOOKUP, (n, *(0,) * inner), several) for n in outer]
    if len(stack.levels) > 1:
        found += [_Forced(MODEL, (n, *(0,) * inner), several) for n in outer]
        found += [_Forced(MODEL, (outer[-1], n, *(0,) * (inner - 1)), several) for n in INNER if inner]
    return found


def _forced_control(stack: Stack, forced: _Forced, batch: int) -> Autopilot:
    """Return an autopilot to which drafts are free, so that it drafts all that the caps allow, or too dear to draft any."""
    levels = len(stack.levels)
    times = np.zeros((levels, SLACK + 1))
    times[:, 1:] = 1e-3 ** np.arange(levels)[:, None]  # whatever its length, a draft takes next to nothing of its verifier's pass
    if not forced.pays:
        times[0, 2:] = 1e3
    prior = np.full((levels, 2, CLASSES, 2), CERTAIN)
    prior[0, MODEL if forced.source == LOOKUP else LOOKUP, :, 0] = 0
    control = Autopilot.create(times, prior, len(forced.caps), rate=1.0, allowance=np.inf)
    control = control.capped(jnp.full((batch,), SLACK, jnp.int32))
    most = jnp.broadcast_to(jnp.asarray(forced.caps, jnp.int32)[:, None], control.most.shape)
    return dataclasses.replace(control, most=most)


def _rounds(stack: Stack, asked: Request, state: State, forced: _Forced) -> tuple[np.ndarray, float]:
    """Run rounds on a copy of the state; return passes by level and rows [L, SLACK + 1], and their seconds."""
    control = _forced_control(stack, forced, len(asked.batch.length))
    begun = jax.tree.map(jnp.copy, state)._replace(
        control=control, plan=control.init(stack.level.draft_lens, len(asked.batch.length))
    )
    jax.block_until_ready(begun)
    began = time.perf_counter()
    end = jax.block_until_ready(
        programs(stack).advance(stack, begun, np.array(asked.batch.limit), asked.sampling, np.int32(forced.rounds))
    )
    seconds = time.perf_counter() - began
    return np.stack([np.asarray(each.by_rows) for each in counts_of(end)]), seconds


def _repeating(prompt: list[int], vocab_size: int) -> list[int]:
    """Return a prompt at whose end look-up finds as much as is ever drafted: the prompt, or its first tokens and others, twice."""
    others = [token for token in range(vocab_size) if token not in prompt][: PERIOD - min(len(prompt), PERIOD)]
    return [*prompt[:PERIOD], *others] * 2


def _solved(passes: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return the times [L, SLACK + 1] that explain `seconds` [rounds] of these passes [rounds, L, SLACK + 1] best."""
    from scipy.optimize import nnls  # it takes longer to import than all of this package

    passes, seconds = passes[seconds > 0], seconds[seconds > 0]  # of what took no longer than one round nothing is known
    levels = passes.shape[1]
    basis = _basis()  # [knots, SLACK + 1]: a level's times are a sum of these, none of them less than 0 times
    design = np.einsum("nlr,kr->nlk", passes, basis).reshape(len(passes), levels * len(basis))
    weight = 1 / seconds  # relative errors
    found, _ = nnls(design * weight[:, None], seconds * weight)
    return found.reshape(levels, len(basis)) @ basis


def _basis() -> np.ndarray:
    rows = np.arange(SLACK + 1)
    ramps = [np.clip((rows - low) / (high - low), 0, None if high == KNOTS[-1] else 1) for low, high in itertools.pairwise(KNOTS)]
    return np.stack([(rows > 0).astype(float), *ramps])
