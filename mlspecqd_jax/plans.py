"""`Plan`: what was measured of a stack, kept in the user's cache under the name of all that it depends on.

Versions, device, processor, and every level's shape and formats; the values of weights change no time. A plan never changes a
greedy or coupled text.
"""

import hashlib
import json
import os
import pathlib
import platform
import tempfile
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from mlspecqd_jax import console
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import read_json
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.user_cache import cache_folder

SCHEMA = 1


class Plan(NamedTuple):
    """What was measured of a stack."""

    key: str  # of `key_of`
    names: tuple[str, ...]  # of the levels
    times: np.ndarray  # f64 [L, SLACK + 1], of passes by level and rows in use, in those of the target over one row
    plain: float  # seconds of such a pass
    speedups: dict[str, float]  # over plain decoding, by what drafts, median of pairs


def key_of(level: Level) -> str:
    """Return the name of what the times of a stack depend on, given its outermost level."""
    device = next(iter(jax.tree.leaves(level.params)[0].devices()))
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "jax": [jax.__version__, jaxlib.__version__],
        "device": [device.platform, device.device_kind, jax.device_count()],
        "processor": [_processor(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()],
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
    times = value.get("times")
    lawful = isinstance(times, list) and all(isinstance(row, list) and len(row) == SLACK + 1 for row in times) and times
    if not lawful or value.get("schema") != SCHEMA or not all(np.isfinite(x) and x >= 0 for row in times for x in row):
        raise InputError(f"{path} is no plan that this version can read")
    if key is not None and value.get("key") != key:
        raise InputError(f"{path} is the plan of another model, machine or version")
    return Plan(value["key"], tuple(value["names"]), np.array(times), float(value["plain"]), dict(value["speedups"]))


def keep(plan: Plan, path: pathlib.Path | None = None) -> pathlib.Path:
    """Write a plan, in one step; return where."""
    path = path_of(plan.key) if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    value = as_json(plan)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(file.name, path)
    return path


def as_json(plan: Plan) -> dict[str, Any]:
    """Return what is kept of a plan."""
    return plan._asdict() | {"schema": SCHEMA, "times": [[round(x, 5) for x in row] for row in plan.times.tolist()]}


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
