"""Integers in groups along K that share a scale and a zero: value = (code - zero) * scale.

How many bits a code has and how many groups there are, the tensors say; how wide a group is, the config alone: 192 inputs in two
groups are groups of 128.

Notation: N outputs, K contracted, G groups along K.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.quantized.codes import every_group
from mlspecqd_jax.loading.quantized.module import Module, Packed
from mlspecqd_jax.weights.formats import STEP
from mlspecqd_jax.weights.halves import halves

BITS = (4, 8)
MULTIPLE = 16  # of which groups are


class Scheme(NamedTuple):
    """What a config says of some layers' weights."""

    bits: int
    group: int | None  # None: the whole row
    symmetric: bool | None = None  # None: it is not said


def scheme_of(config: dict, bits: str, group: str, symmetric: str | None = None) -> Scheme:
    """Return a scheme from the keys that these name; a group of -1, as an absent one, is the whole row.

    Raises:
      InputError: a value that cannot be read.
    """
    number, size = config.get(bits), config.get(group)
    size = None if size == -1 else size
    if type(number) is not int or number not in BITS:
        raise InputError(f"{bits} is {brief(number)}, but weights of 4 and 8 bits alone are read")
    if size is not None and (type(size) is not int or size <= 0 or size % MULTIPLE):
        raise InputError(f"{group} is {brief(size)}, but must be -1 or a positive multiple of {MULTIPLE}")
    said = config.get(symmetric) if symmetric else None
    return Scheme(number, size, said if isinstance(said, bool) else None)


def counts(schemes: Sequence[Scheme], bits: int, k: int) -> list[int]:
    """Return how many groups a row of K codes of so many bits may have."""
    return [1 if s.group is None else -(-k // s.group) for s in schemes if s.bits == bits]


def chosen(schemes: Sequence[Scheme], bits: int, groups: int, module: Module, kind: str) -> Scheme:
    """Return the one scheme that a module of so many bits and groups can be meant by.

    Raises:
      InputError: there is none, or there are several that say different things.
    """
    k = module.shape[1]
    found = [s for s in schemes if counts([s], bits, k) == [groups]]
    if len({s._replace(group=None if groups == 1 else s.group) for s in found}) != 1:
        name = module.tensors[kind].name
        why = "the config has no such" if not found else "the config has several such"
        raise InputError(f"tensor {name} is of {bits} bits in {groups} groups over {k} inputs, but {why} scheme: {list(schemes)}")
    return found[0]


def order_of(module: Module, kind: str, groups: int, group: int) -> np.ndarray | None:
    """Return the inputs in the order of their groups, int [K], from the group of each, or None where that is their own order.

    Raises:
      InputError: the groups are not as wide as they must be.
    """
    k = module.shape[1]
    if kind not in module.tensors:
        return None
    of, plain = module.get(kind, ("I32", "I64"), (k,)), np.arange(k) // group
    if np.array_equal(of, plain):
        return None
    inside = of.min() >= 0 and of.max() < groups
    if not inside or not np.array_equal(np.bincount(of, minlength=groups), np.bincount(plain)):
        raise InputError(f"tensor {module.tensors[kind].name} does not deal {k} inputs into groups of {group}")
    return np.argsort(of, kind="stable")


def packed(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    bits: int,
    group: int | None,
    k: int,
    order: np.ndarray | None = None,
) -> Packed:
    """Return a weight of unsigned codes.

    Args:
      codes: as they are stored (`codes.filled`).
      scales: f32 [N, G].
      zeros: the code that stands for zero, uint8 [N, G]; None is half of the range throughout.
      bits: 4 or 8.
      group: codes that share a scale; None is the whole row.
      k: codes a row.
      order: int32 [K], the column of the weight that each column of the codes belongs to; None is the same.
    """
    half = 1 << bits - 1
    zeros = None if zeros is None or (zeros == half).all() else zeros
    moved = {} if order is None else {"order": order.astype(np.int32)}
    width = -(-k // STEP) * STEP if group is None else group
    if group is None and bits == 8 and zeros is None:
        return Packed("int8", {"codes": codes, "scales": scales, **moved})
    if group is None:  # nothing is rounded so: float16 holds the zeros
        arrays = {"codes": codes, "scales": np.ones(scales.shape, np.float16), "row_scale": scales[:, 0]}
        arrays |= {} if zeros is None else {"minima": -zeros.astype(np.float16)}
    else:
        minima = None if zeros is None else every_group(-scales * zeros, group, k)
        arrays = {"codes": codes} | halves(every_group(scales, group, k), minima)
    if "minima" in arrays:
        return Packed(f"uint{bits}_g{width}", {**arrays, **moved})
    return Packed("int4" if (bits, width) == (4, 32) else f"int{bits}_g{width}", {**arrays, **moved})
