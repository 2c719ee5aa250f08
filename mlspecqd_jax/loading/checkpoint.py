"""Converted checkpoints: parameters saved by orbax in the layout and dtype they are used in, tokenizer and config beside them.

A folder is a converted checkpoint once it holds `mlspecqd.json`, which is written last; it appears under its name by one rename.
Orbax writes one file of plain values a tensor (zarr 2, one chunk, no compression), so that loading maps the files instead of
reading them: on the CPU the parameters are the files' pages, elsewhere they go from there to the device. The quantized leaves of
a twin, where they are stored, stand apart (`drafts/FORMAT`, or `drafts/FORMAT-calibrated`), are read when asked for, and repeat
nothing of the weights.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import read_json, reason
from mlspecqd_jax.loading.gguf import reader, small_files
from mlspecqd_jax.loading.huggingface import HUB_FILES
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.formats import FORMATS, format_of
from mlspecqd_jax.weights.placement import weight_sharding
from mlspecqd_jax.weights.quantization import Recipe, place_quantized, quantize_params, recipe_of_bits, with_head
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from mlspecqd_jax.weights.tensors import HEAD

MARKER = "mlspecqd.json"
WEIGHTS = "weights"
DRAFTS = "drafts"
VERSION = 1
DTYPES = ("bfloat16", "<f4", "<f2", "|u1")  # as zarr writes them: of weights, and of the codes and scales of a twin


def is_converted(folder: pathlib.Path) -> bool:
    """Return whether the folder is a finished converted checkpoint."""
    return (folder / MARKER).is_file()


def save(
    folder: pathlib.Path, source: pathlib.Path, params: dict[str, jax.Array], twins: Mapping[Recipe, dict] | None = None
) -> None:
    """Write params and the source's small files to a new folder; it exists whole or not at all.

    Args:
      folder: a new name.
      source: the folder with config.json and the tokenizer, or a GGUF file, whose keys say the same.
      params: parameters by name.
      twins: parameters of twins by recipe, one a format, by the scale rule `floor`; only their quantized leaves are written.

    Raises:
      InputError: the folder exists already or cannot be written.
    """
    check_new(folder)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    try:
        if source.is_file():
            small_files.write(reader.read(source), temporary)
        else:
            _copy_small_files(source, temporary)
        _say_whether_tied(temporary / "config.json", HEAD not in params)
        _write(temporary / WEIGHTS, params)
        for recipe, twin in (twins or {}).items():
            (temporary / DRAFTS).mkdir(exist_ok=True)
            files = {
                _file(name, leaf, role): array for name, leaf in _quantized(twin).items() for role, array in leaf.arrays.items()
            }
            _write(temporary / DRAFTS / recipe.name, files)
        _mark_finished(temporary, params, list(twins or {}))
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _copy_small_files(source: pathlib.Path, folder: pathlib.Path) -> None:
    for pattern in HUB_FILES:
        if "safetensors" not in pattern:
            for file in filter(os.path.isfile, source.glob(pattern)):
                shutil.copyfile(file, folder / file.name)


def _write(folder: pathlib.Path, tensors: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    size = sum(leaf.nbytes for leaf in tensors.values())
    with _quiet(), _progress(folder, size), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), tensors)


def _say_whether_tied(path: pathlib.Path, tied: bool) -> None:
    """Let a copied config.json say what the weights are, which is what decided where it and the original files differed."""
    config = read_json(path)
    if config.get("tie_word_embeddings") is not tied:
        path.write_text(json.dumps(config | {"tie_word_embeddings": tied}, indent=1) + "\n", encoding="utf-8")


def _quantized(params: dict[str, Any]) -> dict[str, QuantizedArray]:
    return {name: leaf for name, leaf in params.items() if isinstance(leaf, QuantizedArray)}


def _file(name: str, leaf: QuantizedArray, role: str) -> str:
    """Name of one array of a quantized leaf: `lm_head.weight.packed`, as codes are called on disk that share bytes."""
    packed = role == "codes" and format_of(leaf.format).bits < 8
    return f"{name}.{'packed' if packed else role}"


@contextlib.contextmanager
def _progress(folder: pathlib.Path, size: int):
    """Show on a terminal how many of `size` bytes orbax has written so far, under names that begin with the folder's."""
    done = threading.Event()

    def watch(bar):
        while not done.wait(0.2):
            files = (file for start in folder.parent.glob(f"{folder.name}*") for file in start.rglob("*"))
            with contextlib.suppress(OSError):  # a file may be renamed while it is looked at
                bar.update(min(size, sum(file.stat().st_size for file in files)) - bar.n)

    with tqdm(total=size, desc="Writing weights", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        watcher = threading.Thread(target=watch, args=(bar,), daemon=True)
        if not bar.disable:
            watcher.start()
        try:
            yield
        finally:
            done.set()
            if watcher.ident is not None:
                watcher.join()


@contextlib.contextmanager
def _quiet():
    """Hold back orbax's warning that a checkpoint without OCDBT, which is what we ask for, has no OCDBT folders to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _mark_finished(folder: pathlib.Path, params: dict[str, jax.Array], drafts: list[Recipe]) -> None:
    dtypes = sorted({leaf.dtype.name for leaf in params.values()})
    marker: dict[str, Any] = {"format": VERSION, "dtypes": dtypes, "bytes": sum(leaf.nbytes for leaf in params.values())}
    marker |= {
        "drafts": [recipe.format for recipe in drafts if not recipe.calibrated and recipe.bits is None],
        # Unknown to earlier versions.
        "calibrated": [recipe.format for recipe in drafts if recipe.calibrated and recipe.bits is None],
        "bits": [[recipe.bits, recipe.calibrated] for recipe in drafts if recipe.bits is not None],
        "policies": {recipe.name: dict(recipe.policy) for recipe in drafts},
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def check_new(folder: pathlib.Path) -> None:
    """Raise an InputError unless `folder` is a new name in a folder that can be written."""
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already; choose another name or remove it first")
    if not os.path.isdir(folder.parent):
        raise InputError(f"{folder.parent} is not a folder; create it first")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder.parent / f"{_prefix(folder)}{'x' * 8}")
    except (OSError, ValueError) as error:
        raise InputError(f"{brief(folder.name)} is no name for a folder ({reason(error)}); choose another name") from error
    try:
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise InputError(f"{folder.parent} cannot be written ({error.strerror}); choose another folder") from error


def _prefix(folder: pathlib.Path) -> str:
    return f".{folder.name}.unfinished-"


def restore(folder: pathlib.Path, model: Network, dtype: jnp.dtype, mesh: Mesh | None) -> dict[str, jax.Array]:
    """Map the parameters of a converted checkpoint and put them in their place, in `dtype`.

    Raises:
      InputError: the folder was written by another version, or is damaged.
    """
    version = read_json(folder / MARKER).get("format")
    if version != VERSION:
        raise InputError(f"{folder} has format {brief(version)}, but this version reads format {VERSION}; convert the model again")

    def place(name, tensor):
        sharding = None if mesh is None else weight_sharding(tensor.axes, tensor.shape, mesh)
        array = np.asarray(_map(folder / WEIGHTS / name, tensor.shape), jnp.dtype(tensor.dtype or dtype))
        return jax.device_put(array, sharding)

    with _damage_named(folder):
        return jax.block_until_ready({name: place(name, tensor) for name, tensor in model.tensors().items()})


def drafts(folder: pathlib.Path, dtype: str) -> tuple[Recipe, ...]:
    """Return the recipes of the twins that a converted checkpoint holds of what `restore` gives in `dtype`.

    A twin is a function of its model's weights, so stored leaves serve the dtype that they were made from, and float32, which holds
    the same values; in any other the weights are rounded, and their twin is another one.
    """
    marker = read_json(folder / MARKER)
    plain, calibrated = (_formats(folder, marker, kind) for kind in ("drafts", "calibrated"))
    # Some parameters are in float32 in any model.
    same_values = dtype == "float32" or marker.get("dtypes") in ([dtype], sorted({dtype, "float32"}))
    policies = marker.get("policies", {})  # earlier versions made no exceptions
    if not isinstance(policies, dict) or not all(isinstance(policy, dict) for policy in policies.values()):
        raise InputError(f"{folder} is damaged (policies is {brief(policies)} in {MARKER}); convert the model again")
    bits = marker.get("bits", [])
    if not isinstance(bits, list) or not all(map(_is_bits, bits)):
        raise InputError(f"{folder} is damaged (bits is {brief(bits)} in {MARKER}); convert the model again")
    found = [Recipe(format) for format in plain] + [Recipe(format, calibrated=True) for format in calibrated]
    found += [recipe_of_bits({}, number, is_calibrated) for number, is_calibrated in bits]
    found = [dataclasses.replace(recipe, policy=tuple(policies.get(recipe.name, {}).items())) for recipe in found]
    return tuple(found) if same_values else ()


def _is_bits(entry):
    return isinstance(entry, list) and list(map(type, entry)) == [float, bool]


def _formats(folder, marker, kind):
    formats = marker.get(kind, [])
    if not isinstance(formats, list) or not all(isinstance(format, str) and format in FORMATS for format in formats):
        raise InputError(f"{folder} is damaged ({kind} is {brief(formats)} in {MARKER}); convert the model again")
    return formats


def restore_draft(folder: pathlib.Path, model: Network, recipe: Recipe, dtype: jnp.dtype) -> dict[str, QuantizedArray]:
    """Map the quantized leaves of a twin that `save` wrote and put them in their place, for activations of `dtype`.

    Raises:
      InputError: the folder is damaged, or an earlier version wrote codes of six bits to it.
    """
    tensors = with_head(model.tensors())
    weights = {name: jax.ShapeDtypeStruct(tensor.shape, jnp.bfloat16) for name, tensor in model.tensors().items()}
    cast = functools.partial(quantize_params, tensors=tensors, format=recipe.format, policy=dict(recipe.policy))

    def mapped(name, leaf):
        files = {role: folder / DRAFTS / recipe.name / _file(name, leaf, role) for role in leaf.arrays}
        arrays = {role: np.asarray(_map(file, leaf.arrays[role].shape), leaf.arrays[role].dtype) for role, file in files.items()}
        return dataclasses.replace(leaf, arrays=arrays)

    with _damage_named(folder):
        wanted = _quantized(jax.eval_shape(cast, weights))
    _refuse_six_bits_in_bytes(folder, recipe, wanted)
    with _damage_named(folder):
        leaves = {name: mapped(name, leaf) for name, leaf in wanted.items()}
        placed = {name: place_quantized(tensors[name], leaf, model.mesh, dtype) for name, leaf in leaves.items()}
        return jax.block_until_ready(placed)


def _refuse_six_bits_in_bytes(folder: pathlib.Path, recipe: Recipe, leaves: dict[str, QuantizedArray]) -> None:
    for name, leaf in leaves.items():
        if format_of(leaf.format).bits == 6 and (folder / DRAFTS / recipe.format / f"{name}.codes").exists():
            raise InputError(
                f"{folder} holds {name} in {leaf.format} with a byte for each code of six bits, as earlier versions wrote it; "
                "convert the model again"
            )


@contextlib.contextmanager
def _damage_named(folder: pathlib.Path):
    """Turn whatever reading a damaged folder raises into one sentence."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, OverflowError) as error:
        raise InputError(f"{folder} is damaged ({reason(error)}); convert the model again") from error


def _map(folder: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    """Map one tensor from its zarr folder; pages are read when they are first used."""
    layout = read_json(folder / ".zarray")
    if layout["shape"] != list(shape):
        raise InputError(f"tensor {folder.name} has shape {layout['shape']}, but config.json asks for {list(shape)}")
    if layout["chunks"] != list(shape) or layout["compressor"] is not None:
        raise InputError(f"tensor {folder.name} is in pieces or compressed")
    if layout["dtype"] not in DTYPES:  # numpy would take other words for types of more than numbers
        raise InputError(f"tensor {folder.name} is stored as {brief(layout['dtype'])}, but must be one of {', '.join(DTYPES)}")
    file = folder / (".".join("0" * len(shape)) or "0")
    if not os.path.isfile(file):
        raise InputError(f"tensor {folder.name} has no file {file.name}")
    return np.memmap(file, layout["dtype"], "r", shape=shape)
