"""The autopilot on what real models wrote: against every stack of fixed lengths, by the clock of tables (C14).

Half of the texts say what the stacks of fixed lengths are worth in hindsight; the autopilot sees none of them before.
"""

import functools
import pathlib

import numpy as np
import pytest
from fixed_stacks import speeds
from players import play, recorded

from mlspecqd_jax.speculation.autopilot import ALLOWANCE, ALLOWANCE_OF_ALL, LOSS, Autopilot
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.guide import modelled
from mlspecqd_jax.speculation.priors import prior
from mlspecqd_jax.speculation.state import counts_of

PATH = pathlib.Path(__file__).parents[1] / "traces" / "recorded.npz"
SETS = ("demo-0", "demo-0.8", "smollm2-0", "smollm2-0.8")
# Of a pass of the target, its twin and a small draft over one row, and how much more each further row takes, as a part of it.
COSTS = {
    "CPU, 1.1B": ((1, 0.34, 0.05), (0.07, 0.14, 0.0)),
    "cheap rows": ((1, 0.28, 0.03), (0.02, 0.02, 0.0)),
    "dear rows": ((1, 0.45, 0.05), (0.07, 0.07, 0.0)),
    "wide": ((1, 0.29, 0.03), (0.0, 0.0, 0.0)),
}


def times_of(costs, levels):
    first, slopes = COSTS[costs]
    rows = np.arange(SLACK + 1)
    return np.stack([b * (1 + s * np.maximum(rows - 1, 0)) * (rows > 0) for b, s in zip(first, slopes, strict=True)])[:levels]


@functools.cache
def compared(name, costs):
    """Return the speed of the autopilot, of the best stack of fixed lengths, and the least of a text."""
    played, vocab_size = recorded(PATH)[name]
    levels = 2 if played.small is None else 3
    times = times_of(costs, levels)
    control = Autopilot.create(times, prior([True, False, False][:levels]), levels - (played.small is not None))
    took = []
    for r in range(len(played.text)):
        state = play(played.rows(slice(r, r + 1)), vocab_size, control)
        took.append(float(modelled(control.times, counts_of(state))))
        assert took[-1] <= LOSS * played.new + min(ALLOWANCE, ALLOWANCE_OF_ALL * played.new) + 1e-3
    return played.new * len(took) / sum(took), max(speeds(played, times).values())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == SETS[-1] else pytest.mark.slow) for name in SETS])
@pytest.mark.parametrize("costs", COSTS)
def test_it_is_about_as_fast_as_the_best_stack_of_fixed_lengths(name, costs):
    ours, best = compared(name, costs)
    assert ours >= 0.95 * best


@pytest.mark.slow
def test_sampled_texts_are_written_as_fast_as_by_the_best_stacks():
    ratios = [np.divide(*compared(name, costs)) for name in SETS if name.endswith("0.8") for costs in COSTS]
    assert np.exp(np.mean(np.log(ratios))) >= 1.0
