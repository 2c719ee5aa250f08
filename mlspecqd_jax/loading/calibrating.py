"""Calibrated twins: weights rounded to make up for each other's errors, on text that the model itself writes.

Each weight is kept in the user's cache as soon as it is done, by the bits of all weights, so that what was interrupted goes on
where it was, and what is finished is not made again. What has not been used for longest goes when the cache is full.
"""

import functools
import pathlib
import shutil
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from mlspecqd_jax import console
from mlspecqd_jax.loading.keeping import keep, key_of
from mlspecqd_jax.network.moments import second_moments
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.network.own_text import own_text
from mlspecqd_jax.network.sensitivity import weights_of
from mlspecqd_jax.user_cache import cache_folder
from mlspecqd_jax.weights.calibration import calibrated, influence
from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.quantization import rule_of
from mlspecqd_jax.weights.quantized_array import QuantizedArray

TEXTS, POSITIONS = 32, 128  # of the text that is calibrated on
VERSION = 1  # of how it is done
LARGEST = 2**34  # bytes of all that is kept


def calibrated_weights(
    network: Network, params: Mapping[str, jax.Array], first: int, formats: Mapping[str, str | None], scale_rule: str
) -> dict[str, QuantizedArray]:
    """Return weights rounded to formats by `weights.calibration`, by name, as they are stored.

    Args:
      network: of the model.
      params: its parameters, not quantized.
      first: the token with which the texts begin that the model writes for this.
      formats: of each weight, None for one that is kept.
      scale_rule: a name of `cast.SCALE_RULES`, where it is one of the format's.
    """
    dtype = next(iter(params.values())).dtype.name
    key = key_of(params, VERSION, repr(network.config), dtype, TEXTS, POSITIONS, first)
    folder = cache_folder("calibration") / key
    weights = weights_of(network, params)
    wanted = {name: (format, rule_of(format, scale_rule)) for name, format in formats.items() if format is not None}
    files = {name: folder / f"{name}.{format}.{rule}.npz" for name, (format, rule) in wanted.items()}
    kept = {name: _kept(files[name], weights[name], format) for name, (format, _) in wanted.items()}
    done = {name: leaf for name, leaf in kept.items() if leaf is not None}
    if len(done) < len(wanted):
        with tqdm(total=len(wanted), initial=len(done), desc="Calibrating", unit="weight", disable=None, leave=False) as bar:
            tokens = _text(folder / "text.npy", network, params, first)
            for moments in second_moments(network, params, tokens, jnp.ones(tokens.shape, jnp.float32)):
                last = None  # weights that read the same share what is found of it
                for name in sorted(moments.keys() & wanted.keys() - done.keys()):
                    if last is None or not _equal(last[0], moments[name]):
                        last = moments[name], influence(moments[name])
                    done[name] = _rounded(name, weights[name], last[1], *wanted[name])
                    keep(files[name], functools.partial(_write, leaf=done[name]))
                    bar.update()
                if len(done) == len(wanted):
                    break
    _clean_up(folder)
    return done


def _text(file: pathlib.Path, network, params, first) -> jax.Array:
    positions = min(POSITIONS, network.config.max_positions)
    try:
        tokens = np.load(file, allow_pickle=False)
        if tokens.shape == (TEXTS, positions) and tokens.dtype == np.int32:
            return jnp.asarray(tokens)
    except (OSError, ValueError, EOFError):
        pass  # not there, or damaged
    tokens = own_text(network, dict(params), jnp.full((TEXTS,), first, jnp.int32), positions, jax.random.key(0))
    keep(file, lambda opened: np.save(opened, tokens))
    return tokens


def _rounded(name, w, found, format, scale_rule) -> QuantizedArray:
    if found is None:
        console.say(f"{name}: what it reads has no finite second moments; rounded as without calibration")
        leaf = quantize(w, format, scale_rule)
    else:
        leaf = calibrated(w, found, format, scale_rule)
    return jax.tree.map(np.asarray, leaf)


def _write(file: BinaryIO, leaf: QuantizedArray) -> None:
    np.savez(file, **{role: np.asarray(array) for role, array in leaf.arrays.items()})  # ty: ignore[invalid-argument-type]


@jax.jit
def _same(one, other):
    return jnp.all(one == other)


def _equal(one, other) -> bool:
    return one.shape == other.shape and bool(_same(one, other))


def _kept(file: pathlib.Path, w: jax.Array, format: str) -> QuantizedArray | None:
    """The weight that a file holds, unless it is not there or damaged."""
    stored = jax.eval_shape(lambda w: quantize(w, format), jax.ShapeDtypeStruct(w.shape, w.dtype))
    try:
        with np.load(file, allow_pickle=False) as opened:
            arrays = {role: opened[role] for role in stored.arrays}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
    fits = all(arrays[role].shape == like.shape and arrays[role].dtype == like.dtype for role, like in stored.arrays.items())
    return QuantizedArray(arrays, stored.shape, format) if fits else None


def _clean_up(used: pathlib.Path) -> None:
    """Let this model's folder be the last used; delete those used longest ago while all of them together are too large."""
    try:
        used.touch()
        folders = sorted((f for f in used.parent.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime, reverse=True)
        size = 0
        for folder in folders:
            size += sum(file.stat().st_size for file in folder.iterdir())
            if size > LARGEST and folder != used:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return  # another process cleans up too
