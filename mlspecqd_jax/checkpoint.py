"""Converted checkpoints: parameters saved by orbax in the layout and dtype they are used in, tokenizer and config beside them.

A folder is a converted checkpoint once it holds `mlspecqd.json`, which is written last; it appears under its name by one rename.
Orbax writes one file of plain values a tensor (zarr 2, one chunk, no compression), so that loading maps the files instead of
reading them: on the CPU the parameters are the files' pages, elsewhere they go from there to the device.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
import threading

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from mlspecqd_jax.huggingface import HUB_FILES, read_json
from mlspecqd_jax.partition import weight_sharding
from mlspecqd_jax.transformer import LanguageModel

MARKER = "mlspecqd.json"
WEIGHTS = "weights"
VERSION = 1


def is_converted(folder: pathlib.Path) -> bool:
    """Return whether the folder is a finished converted checkpoint."""
    return (folder / MARKER).is_file()


def save(folder: pathlib.Path, source: pathlib.Path, params: dict[str, jax.Array]) -> None:
    """Write params and the source's small files to a new folder; it exists whole or not at all.

    Raises:
      ValueError: the folder exists already or cannot be written.
    """
    import orbax.checkpoint as ocp

    check_new(folder)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.unfinished-", dir=folder.parent))
    try:
        for pattern in HUB_FILES:
            if "safetensors" not in pattern:
                for file in source.glob(pattern):
                    shutil.copyfile(file, temporary / file.name)
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
        size = sum(leaf.nbytes for leaf in params.values())
        with _quiet(), _progress(temporary / WEIGHTS, size), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save((temporary / WEIGHTS).absolute(), params)
        _mark_finished(temporary, params)
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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


def _mark_finished(folder: pathlib.Path, params: dict[str, jax.Array]) -> None:
    dtypes = sorted({leaf.dtype.name for leaf in params.values()})
    marker = {"format": VERSION, "dtypes": dtypes, "bytes": sum(leaf.nbytes for leaf in params.values())}
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def check_new(folder: pathlib.Path) -> None:
    """Raise a ValueError unless `folder` is a new name in a folder that can be written."""
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another name or remove it first")
    if not folder.parent.is_dir():
        raise ValueError(f"{folder.parent} is not a folder; create it first")
    try:
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise ValueError(f"{folder.parent} cannot be written ({error.strerror}); choose another folder") from error


def restore(folder: pathlib.Path, model: LanguageModel, dtype: jnp.dtype, mesh: Mesh | None) -> dict[str, jax.Array]:
    """Map the parameters of a converted checkpoint and put them in their place, in `dtype`.

    Raises:
      ValueError: the folder was written by another version, or is damaged.
    """
    version = read_json(folder / MARKER).get("format")
    if version != VERSION:
        raise ValueError(f"{folder} has format {version}, but this version reads format {VERSION}; convert the model again")

    def place(name, shape):
        sharding = None if mesh is None else weight_sharding(name, shape, mesh)
        return jax.device_put(np.asarray(_map(folder / WEIGHTS / name, shape), dtype), sharding)

    try:
        return jax.block_until_ready({name: place(name, shape) for name, shape in model.shapes().items()})
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} is damaged ({reason}); convert the model again") from error


def _map(folder: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    """Map one tensor from its zarr folder; pages are read when they are first used."""
    layout = json.loads((folder / ".zarray").read_text(encoding="utf-8"))
    if layout["shape"] != list(shape):
        raise ValueError(f"tensor {folder.name} has shape {layout['shape']}, but config.json asks for {list(shape)}")
    if layout["chunks"] != list(shape) or layout["compressor"] is not None:
        raise ValueError(f"tensor {folder.name} is in pieces or compressed")
    return np.memmap(folder / ".".join("0" * len(shape)), layout["dtype"], "r", shape=shape)
