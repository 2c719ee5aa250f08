"""`Tensor`: what is known of a parameter before it is there: its shape, how it may be split and cast, and where a file holds it.

Checkpoints fuse, transpose and interleave what a network keeps apart. One formula undoes all of it: rows of the file's tensors one
after another, in equal groups, a slice of each group (`Source`). The weights of several experts are one tensor here, in a file one
each, or one of three dimensions.

Notation: N outputs, K contracted, the last axis of a weight [N, K]; a bias is [N].
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

AXIS = "model"  # of a mesh, over which weights are split
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Source(NamedTuple):
    """Rows of a file: those of `names` one after another, in `groups` equal parts; of each part, the rows from start to stop."""

    names: tuple[str, ...]
    groups: int = 1
    start: int = 0
    stop: int | None = None  # None is the end
    transpose: bool = False  # whether the file holds [K, N]
    stack: int | None = None  # how many of them each of `names` holds, [stack, N, K]; None is one, [N, K]
    turn: bool = False  # whether what is taken of a part, [R, K], becomes [K, R]


class Tensor(NamedTuple):
    """A parameter."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # the mesh axis over which each dimension may be split, or None; () splits nothing
    linear: bool  # whether it is the weight of a linear layer, which may be quantized
    sources: tuple[Source, ...]  # its rows are theirs, one source's after another's
    dtype: str | None = None  # that it has whatever the model's
    experts: int | None = None  # of how many experts it holds the rows, one's after another's; None is no expert's
    gathered: bool = False  # whether it is a table, of which a pass reads some rows


def read(tensor: Tensor, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return a parameter in its shape; `get` returns a tensor of the file by name."""
    pieces = [_rows(source, tensor.shape, get) for source in tensor.sources]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def stored_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of the file's tensors that some parameters come from: as many rows as the furthest that is read."""
    shapes = {}
    for tensor in tensors.values():
        for source in tensor.sources:
            if not tensor.shape:
                shapes |= dict.fromkeys(source.names, ())
                continue
            taken, rest = tensor.shape[0] // source.groups, tensor.shape[1:]
            if source.turn:
                taken, rest = tensor.shape[1], (taken,)
            stop = source.start + taken if source.stop is None else source.stop
            for name in source.names:
                rows = source.groups * stop // (len(source.names) * (source.stack or 1))
                shape = _stored_shape(source, rows, rest)
                shapes[name] = tuple(map(max, shapes.get(name, shape), shape))  # of some parameters' rows, the furthest
    return shapes


def parameters(tensors: Mapping[str, Tensor]) -> int:
    """Count the numbers that the parameters hold."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def _stored_shape(source: Source, rows: int, rest: tuple[int, ...]) -> tuple[int, ...]:
    shape = (*rest, rows) if source.transpose else (rows, *rest)
    return shape if source.stack is None else (source.stack, *shape)


def _rows(source: Source, shape: tuple[int, ...], get: Callable[[str], np.ndarray]) -> np.ndarray:
    rest = (shape[0] // source.groups,) if source.turn else shape[1:]
    parts = [part.swapaxes(-1, -2) if source.transpose and rest else part for part in map(get, source.names)]
    if len(parts) == 1 and source[1:4] == (1, 0, None) and source.stack is None and not source.turn:
        return parts[0]  # as it was mapped
    rows = np.concatenate([part.reshape(-1, *rest) for part in parts]) if len(parts) > 1 else parts[0]
    taken = rows.reshape(source.groups, -1, *rest)[:, source.start : source.stop]
    return (taken.swapaxes(1, 2) if source.turn else taken).reshape(-1, *shape[1:])
