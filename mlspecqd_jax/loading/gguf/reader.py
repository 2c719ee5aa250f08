"""The header of a GGUF file: its keys, and where each tensor lies; the data is mapped and read only when it is asked for.

Layout, little-endian: "GGUF", u32 version, u64 number of tensors, u64 number of keys; each key a string (u64 length, UTF-8), a u32
type and a value; each tensor a string, u32 rank, u64 sizes (fastest first), u32 type, u64 offset into the data, which begins at the
next multiple of `general.alignment`. A model may be split over files NAME-00001-of-0000N.gguf, the first of which has the keys.

Source: the specification of GGUF in ggml's docs/gguf.md.
"""

import collections
import dataclasses
import math
import os
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import printable, reason
from mlspecqd_jax.loading.gguf.blocks import BLOCKS, TYPE_NAMES, Block

SUFFIX, MAGIC, VERSIONS = ".gguf", b"GGUF", (2, 3)
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's, by type of value
FLOAT, TEXT, LIST = 6, 8, 9
MOST_RANKS = 4


class Entry(NamedTuple):
    """A tensor of a file."""

    name: str
    shape: tuple[int, ...]  # slowest first, as numpy's: [N, K] of a weight
    block: Block
    file: pathlib.Path
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block.elements * self.block.nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class GGUF:
    """What the header of a model says; `path` is the first of its files."""

    path: pathlib.Path
    keys: Mapping[str, Any]  # numbers, texts, and lists of one kind of these
    tensors: Mapping[str, Entry]
    parts: int = 1

    @property
    def types(self) -> dict[str, int]:
        """How many tensors are stored in each type, the most frequent first."""
        return dict(collections.Counter(entry.block.name for entry in self.tensors.values()).most_common())

    @property
    def is_quantized(self) -> bool:
        """Whether some tensors are stored in blocks of few bits."""
        return any(entry.block.format is not None for entry in self.tensors.values())


def is_gguf(path: str | os.PathLike) -> bool:
    """Return whether a path is named as a GGUF file is."""
    return os.fspath(path).endswith(SUFFIX)


def parts_of(name: str) -> list[str]:
    """Return the names of all files of a split model by one of them; of another one, its own."""
    split = PART.fullmatch(name)
    if split is None or int(split[3]) == 0:
        return [name]
    return [f"{split[1]}-{i:05}-of-{split[3]}{SUFFIX}" for i in range(1, int(split[3]) + 1)]


def read(path: pathlib.Path) -> GGUF:
    """Read the header of a model, which may be one file or split over several, of which `path` is any.

    Raises:
      InputError: it is no GGUF file, of another version or byte order, truncated, damaged, holds a type of tensor that is not
        read, or a part is missing.
    """
    paths = [path.with_name(name) for name in parts_of(path.name)]
    keys, tensors = _read_file(paths[0])
    count = keys.get("split.count", 1)
    if count not in (0, 1) or len(paths) > 1:
        if count != len(paths):
            raise InputError(f"{paths[0]} says that its model is split over {brief(count)} files, but its name says {len(paths)}")
        for i, part in enumerate(paths[1:], 1):
            more, their = _read_file(part)
            if (more.get("split.no"), more.get("split.count")) != (i, count):
                raise InputError(f"{part} says that it is part {brief(more.get('split.no'))}, but its name says {i} from 0")
            twice = next(iter(their.keys() & tensors.keys()), None)
            if twice is not None:
                raise InputError(f"{part} holds tensor {brief(twice)}, which another part holds too; download the files again")
            tensors |= their
        if keys.get("split.tensors.count", len(tensors)) != len(tensors):
            said = brief(keys["split.tensors.count"])
            raise InputError(
                f"{paths[0]} says that its parts hold {said} tensors, but they hold {len(tensors)}; download them again"
            )
    return GGUF(paths[0], keys, tensors, len(paths))


def raw(entry: Entry) -> np.ndarray:
    """Map the bytes of a tensor: uint8 [rows, blocks, bytes of a block], a vector being one row."""
    rows = math.prod(entry.shape[:-1])
    shape = (rows, entry.shape[-1] // entry.block.elements, entry.block.nbytes)
    return np.memmap(entry.file, np.uint8, "r", entry.offset, shape)


def _read_file(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    if not os.path.isfile(path):
        raise InputError(f"{path} is missing; a split model needs all of its files in one folder")
    try:
        size = os.path.getsize(path)
        data = memoryview(np.memmap(path, np.uint8, "r") if size else b"")  # ty: ignore[invalid-argument-type]  (arrays are buffers)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    try:
        return _parse(path, _Cursor(data), size)
    except (struct.error, EOFError) as error:
        raise InputError(f"{path} is truncated; download it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged ({reason(error)}); download it again") from error


class _Cursor:
    """Where the next value of a header is read."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, form: str):
        """Return one number."""
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        size = self.take("Q")
        if size > len(self.data) - self.at:
            raise EOFError
        self.at += size
        return str(self.data[self.at - size : self.at], "utf-8")


def _parse(path: pathlib.Path, cursor: _Cursor, size: int) -> tuple[dict[str, Any], dict[str, Entry]]:
    if bytes(cursor.data[:4]) != MAGIC:
        raise InputError(f"{path} is no GGUF file (it does not begin with {MAGIC.decode()}); download it again")
    cursor.at = len(MAGIC)
    version = cursor.take("I")
    if version % 2**16 == 0:
        raise InputError(f"{path} is big-endian, which is not read; convert the model on a little-endian machine")
    if version not in VERSIONS:
        raise InputError(f"{path} has version {version} of GGUF, but versions 2 and 3 are read; convert the model again")
    tensors, keys = cursor.take("Q"), cursor.take("Q")
    found: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in found:
            raise InputError(f"{path} has the key {brief(key)} twice; download it again")
        found[key] = _value(path, cursor, key, cursor.take("I"))
    table = [_row(path, cursor) for _ in range(tensors)]
    alignment = found.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment % 8:
        raise InputError(f"{path}: general.alignment is {brief(alignment)}, but must be a multiple of 8; download it again")
    start = -(-cursor.at // alignment) * alignment
    entries = {}
    for name, shape, block, offset in table:
        entry = Entry(name, shape, block, path, start + offset)
        if name in entries:
            raise InputError(f"{path} holds tensor {brief(name)} twice; download it again")
        if offset % alignment or entry.offset + entry.nbytes > size:
            end = "is truncated" if not offset % alignment else "is damaged"
            raise InputError(f"{path} {end} (tensor {brief(name)} lies at {offset:,}); download it again")
        entries[name] = entry
    return found, entries


def _row(path: pathlib.Path, cursor: _Cursor) -> tuple[str, tuple[int, ...], Block, int]:
    name = printable(cursor.text())
    rank = cursor.take("I")
    if not 1 <= rank <= MOST_RANKS:
        raise InputError(f"{path}: tensor {brief(name)} has {rank} dimensions, but may have 1 to {MOST_RANKS}; download it again")
    shape = tuple(cursor.take("Q") for _ in range(rank))[::-1]
    kind, offset = cursor.take("I"), cursor.take("Q")
    if kind not in BLOCKS:
        raise InputError(
            f"{path}: tensor {brief(name)} is stored as {TYPE_NAMES.get(kind, f'type {kind}')}, which is not read; read are "
            f"{', '.join(block.name for block in BLOCKS.values())}"
        )
    block = BLOCKS[kind]
    if 0 in shape or shape[-1] % block.elements:
        raise InputError(f"{path}: tensor {brief(name)} has shape {list(shape)}, which {block.name} cannot be; download it again")
    return name, shape, block, offset


def _value(path: pathlib.Path, cursor: _Cursor, key: str, kind: int):
    if kind == TEXT:
        return cursor.text()
    if kind == FLOAT:
        return _shortest(cursor.take("f"))
    if kind in NUMBERS:
        return cursor.take(NUMBERS[kind])
    if kind != LIST:
        raise InputError(f"{path}: key {brief(key)} has a value of type {kind}, which GGUF does not know; download it again")
    kind, count = cursor.take("I"), cursor.take("Q")
    if kind == TEXT:
        return [cursor.text() for _ in range(count)]
    if kind not in NUMBERS:
        raise InputError(f"{path}: key {brief(key)} is a list of values of type {kind}, which is not read; download it again")
    width = struct.calcsize(NUMBERS[kind])
    if count * width > len(cursor.data) - cursor.at:
        raise EOFError
    values = np.frombuffer(cursor.data, f"<{NUMBERS[kind]}", count, cursor.at)
    cursor.at += count * width
    return values.tolist()


def _shortest(value: float) -> float:
    """Return the shortest decimal that a float32 stands for: 1e-05, which its writer had, not 9.99999975e-06."""
    return float(str(np.float32(value)))
