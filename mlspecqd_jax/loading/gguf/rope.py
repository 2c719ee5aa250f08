"""How a GGUF file says that rotary frequencies are scaled: by keys `A.rope.scaling.*`, or by divisors in rope_freqs.weight."""

import math
from typing import Any

import numpy as np

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.gguf.blocks import values
from mlspecqd_jax.loading.gguf.reader import GGUF, raw

DIVISORS = "rope_freqs.weight"
LOW, HIGH = 1.0, 4.0  # low_freq_factor and high_freq_factor of all of Llama 3.1 and 3.2
CLOSE = 1e-5  # relative; the divisors were computed in float32


def rope_scaling(file: GGUF, base: float, head_dim: int) -> dict[str, Any] | None:
    """Return config.json's `rope_scaling`, or None where frequencies are as they are.

    Args:
      file: of which keys and, if it is there, rope_freqs.weight are read.
      base: of the frequencies.
      head_dim: D.

    Raises:
      InputError: a scaling that has no counterpart there.
    """
    scaling = _of_keys(file)
    if DIVISORS not in file.tensors:
        return scaling
    if scaling is not None:
        raise InputError(f"{file.path} scales rotary positions by keys and by {DIVISORS}, but only one of them can be read")
    entry = file.tensors[DIVISORS]
    if entry.shape != (head_dim // 2,):
        raise InputError(
            f"{file.path}: tensor {DIVISORS} has shape {list(entry.shape)}, but heads of {head_dim} need {head_dim // 2}"
        )
    return _llama3(file, values(entry.block, raw(entry), np.empty((1, head_dim // 2), np.float32))[0], base)


def _of_keys(file: GGUF) -> dict[str, Any] | None:
    prefix = f"{file.keys['general.architecture']}.rope."
    found = {name: file.keys.get(prefix + name) for name in ("scaling.type", "scaling.factor", "scale_linear")}
    factor = found["scaling.factor"] or found["scale_linear"]  # the latter in older files
    kind = found["scaling.type"] or "linear"
    if kind == "none" or factor in (None, 0, 1):
        return None
    if kind in ("yarn", "longrope"):
        raise InputError(f"{file.path}: {prefix}scaling.type {brief(kind)} is not supported; supported: linear, none")
    scaling = {"rope_type": kind, "factor": factor}
    positions = file.keys.get(f"{prefix}scaling.original_context_length")
    return scaling if kind == "linear" or positions is None else scaling | {"original_max_position_embeddings": positions}


def _llama3(file: GGUF, divisors: np.ndarray, base: float) -> dict[str, Any] | None:
    """Return the parameters of Llama 3.1's rule that give these divisors.

    A frequency f turns t = positions * f / 2 pi times within the original context. Its divisor is 1 where t >= HIGH, `factor` where
    t <= LOW, and between 1 / ((1 - s) / factor + s) with s = (t - LOW) / (HIGH - LOW), from which positions follow.
    """
    factor = float(divisors.max())
    if np.all(np.abs(divisors - 1) < CLOSE):
        return None
    d = len(divisors)
    frequencies = base ** (-np.arange(d) / d)
    candidates = [8192]
    for divisor, frequency in zip(divisors.astype(np.float64), frequencies, strict=True):
        if 1 + CLOSE < divisor < factor * (1 - CLOSE):
            smooth = (1 / divisor - 1 / factor) / (1 - 1 / factor)
            candidates.append(round((LOW + smooth * (HIGH - LOW)) * 2 * math.pi / frequency))
    for positions in candidates if 1 < factor < math.inf else ():
        smooth = np.clip((positions * frequencies / (2 * math.pi) - LOW) / (HIGH - LOW), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=CLOSE, atol=0):
            kind = {"rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": HIGH}
            return kind | {"original_max_position_embeddings": positions}
    raise InputError(
        f"{file.path}: tensor {DIVISORS} divides rotary frequencies by {brief(divisors.tolist())}, which is not Llama 3.1's rule, "
        "the only one that is read; use the original checkpoint"
    )
