"""`Plan`: what was measured of a stack, kept in the user's cache under the name of all that it depends on.

Versions, device, processor, and every level's shape and formats; the values of weights change no time. The plan that chose what
drafts for a model is kept under the name of the model alone too. A plan never changes a greedy or coupled text.

Notation: L levels.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from mlspecqd_jax import console
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.fingerprints import processor_name
from mlspecqd_jax.json_files import read_json
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.counts import Counts
from mlspecqd_jax.speculation.guide import CLASSES
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.user_cache import cache_folder

SCHEMA = 3
REFINING, MOST_REFINED = 0.1, 0.25  # what a run's error changes of times, and the most it may
ENOUGH, SETTLED = 64, 0.1  # passes of the target from which a run says something, and an error below which it says nothing new


class Tried(NamedTuple):
    """What drafts might be worth: speeds over plain decoding, by how tokens are chosen."""

    drafts: tuple[str, ...]  # as `--draft` takes them; () is plain decoding
    predicted: dict[str, float]  # of the best fixed length, by `replay`; {} of drafts that are not replayed
    measured: dict[str, float]  # median of pairs; {} of drafts that promised less than others


class Plan(NamedTuple):
    """What was measured of a stack, and of others that it was chosen from."""

    key: str  # of `key_of`
    names: tuple[str, ...]  # of the levels
    times: np.ndarray  # f64 [L, SLACK + 1], of passes by level and rows in use, in those of the target over one row
    asking: float  # what a round takes beyond a plain one if a draft is asked for and there is none, in the same
    plain: float  # seconds of such a pass
    seen: np.ndarray  # int [L, 2, 8, 2], accepted and judged by level, source and class (`guide`) of the texts that were written
    speedups: dict[str, float]  # over plain decoding, by how tokens are chosen, median of pairs
    drafts: tuple[str, ...] = ()  # as `--draft` takes them, where it chose
    tried: tuple[Tried, ...] = ()  # what it chose from

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file of one's own, such as to pin what a seed means under the rejection rule."""
        keep(self, pathlib.Path(path))

    @staticmethod
    def load(path: str | os.PathLike) -> "Plan":
        """Read what `save` wrote, for `stack(..., lengths=plan)`.

        Raises:
          InputError: the file is no plan.
        """
        return loaded(pathlib.Path(path))


def key_of(level: Level) -> str:
    """Return the name of what the times of a stack depend on, given its outermost level."""
    device = next(iter(jax.tree.leaves(level.params)[0].devices()))
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "jax": [jax.__version__, jaxlib.__version__],
        "device": [device.platform, device.device_kind, jax.device_count()],
        "processor": [processor_name(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()],
        "levels": [
            [repr(each.model), str(jax.tree.structure(each.params)), each.draft_len, each.window_multiple, each.share_cache]
            + [[leaf.shape, str(leaf.dtype)] for leaf in jax.tree.leaves(each.params)]
            for each in level.levels
        ],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def path_of(key: str) -> pathlib.Path:
    """Return where the plan of this key is kept."""
    return cache_folder("plans") / f"{key}.json"


def kept(key: str) -> Plan | None:
    """Return the plan that is kept under a key, or None; what cannot be used is as good as none, and said in one line."""
    path = path_of(key)
    if not path.is_file():
        return None
    try:
        return loaded(path, key)
    except InputError as error:
        console.say(f"mlspecqd: {error}; times are guessed until 'mlspecqd plan' measures them anew")
        return None


def loaded(path: pathlib.Path, key: str | None = None) -> Plan:
    """Read a plan.

    Raises:
      InputError: the file is no plan, or one of another stack, machine or version than `key` names.
    """
    value = read_json(path)
    try:
        plan = _read(value)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no plan that this version can read") from error
    if key is not None and plan.key != key:
        raise InputError(f"{path} is the plan of another model, machine or version")
    return plan


def _read(value: dict[str, Any]) -> Plan:
    """Return a plan from what is kept of it, or raise one of the errors that reading something else gives."""
    times = np.array(value["times"], np.float64)
    names, tried = tuple(value["names"]), tuple(Tried(tuple(drafts), *speeds) for drafts, *speeds in value["tried"])
    if value["schema"] != SCHEMA or times.shape != (len(names), SLACK + 1) or not np.all(np.isfinite(times) & (times >= 0)):
        raise ValueError
    seen = np.array(value["seen"], np.int64)
    if seen.shape != (len(names), 2, CLASSES, 2) or np.any(seen < 0):
        raise ValueError
    asking, plain = float(value["asking"]), float(value["plain"])
    return Plan(value["key"], names, times, asking, plain, seen, dict(value["speedups"]), tuple(value["drafts"]), tried)


def keep(plan: Plan, path: pathlib.Path | None = None) -> pathlib.Path:
    """Write a plan, in one step; return where."""
    path = path_of(plan.key) if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    value = as_json(plan)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(file.name, path)
    return path


def seconds_of(plan: Plan, passes: np.ndarray) -> np.ndarray:
    """Return the seconds [L] of passes [L, SLACK + 1] of each level by rows."""
    return plan.plain * np.sum(passes * plan.times, axis=1)


def refined(plan: Plan, passes: np.ndarray, seconds: float) -> Plan:
    """Return a plan whose times are a little nearer to what a run took: its error is shared out as its levels took part in it.

    Args:
      plan: of a stack.
      passes: [L, SLACK + 1], those of the run, by level and rows.
      seconds: that they took.
    """
    shares = seconds_of(plan, passes)
    change = (seconds - shares.sum()) * shares / max(np.sum(shares**2), 1e-30)
    times = plan.times * (1 + np.clip(REFINING * change, -MOST_REFINED, MOST_REFINED))[:, None]
    return plan._replace(times=times / times[0, 1], plain=float(plan.plain * times[0, 1]))


def learn(level: Level, counts: tuple[Counts, ...], seconds: float) -> None:
    """Refine the plan that is kept of a stack, given its outermost level, by the passes of one row's run and their seconds."""
    passes = np.stack([np.asarray(each.by_rows) for each in counts])
    if len(counts[0].rounds) > 1 or passes[0].sum() < ENOUGH:
        return
    path = path_of(key_of(level))
    with contextlib.suppress(InputError, OSError):  # what cannot be used is said where it is to be used
        plan = loaded(path, path.stem)
        seconds -= plan.plain * plan.asking * int(counts[0].in_vain)
        if abs(seconds / seconds_of(plan, passes).sum() - 1) > SETTLED:  # else the plan stays, and texts under rejection with it
            keep(refined(plan, passes, seconds))


def as_json(plan: Plan) -> dict[str, Any]:
    """Return what is kept of a plan."""
    times = [[round(x, 5) for x in row] for row in plan.times.tolist()]
    return plan._asdict() | {"schema": SCHEMA, "times": times, "seen": plan.seen.tolist()}
