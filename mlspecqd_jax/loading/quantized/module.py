"""`Module`: the tensors that a file holds of one linear layer; `Packed`: the same weight as it is stored here.

What a module is comes from its tensors: which there are, of which types and shapes. Every method of quantization is a function from
the quantization's config to a `Reader`, and every refusal names the tensor.

Notation: N outputs, K contracted, G groups along K.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlspecqd_jax.errors import InputError

FLOATS = ("F16", "BF16", "F32")
PLAIN = ("F64", *FLOATS)  # what a weight that was left as it is may be


class Stored(NamedTuple):
    """A tensor of a file."""

    name: str  # in the file
    dtype: str  # safetensors' name
    array: np.ndarray


class Packed(NamedTuple):
    """A weight in a format of `weights.formats`, its arrays by role as `QuantizedArray` has them."""

    format: str
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer of a file, without its bias and without what does not bear on its weight."""

    name: str
    shape: tuple[int, int]  # N, K
    tensors: Mapping[str, Stored]  # by the last part of their names

    @property
    def is_plain(self) -> bool:
        """Whether it was left as it is."""
        return self.tensors.keys() == {"weight"} and self.tensors["weight"].dtype in PLAIN

    def holds(self, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
        """Raise an InputError unless these are the module's tensors, no less and no more."""
        for kind in needed:
            if kind not in self.tensors:
                raise InputError(f"tensor {self.name}.{kind} is missing, without which {_listed(self.tensors)} mean nothing")
        for kind, stored in self.tensors.items():
            if kind not in (*needed, *optional):
                raise InputError(f"tensor {stored.name} is not accounted for beside {', '.join(needed)}; its meaning is not known")

    def get(self, kind: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> np.ndarray:
        """Return a tensor of one of these types and shapes.

        Raises:
          InputError: it is of another type or shape.
        """
        name, dtype, array = self.tensors[kind]
        if dtype not in dtypes:
            raise InputError(f"tensor {name} is stored as {dtype}, but must be {' or '.join(dtypes)}")
        if array.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise InputError(f"tensor {name} has shape {list(array.shape)}, but a weight {list(self.shape)} needs {wanted}")
        return array

    def scales(self, kind: str, *shapes: tuple[int, ...], dtypes: Sequence[str] = FLOATS) -> np.ndarray:
        """Return scales in float32; a byte s of a type without a mantissa is 2^(s - 127).

        Raises:
          InputError: as `get`; or one is not finite, or a row of them is zero.
        """
        array, name = self.get(kind, dtypes, *shapes), self.tensors[kind].name
        if array.dtype == np.uint8:
            array = np.where(array == 255, np.nan, np.ldexp(np.float32(1), array.astype(np.int32) - 127))
        scales = array.astype(np.float32)
        if not np.isfinite(scales).all():
            raise InputError(f"tensor {name} holds NaN or infinity; use an intact checkpoint")
        if not scales.reshape(scales.shape or (1,)).any(axis=-1).all():
            raise InputError(f"tensor {name} holds a row of zeros only, as one that was never written; use an intact checkpoint")
        return scales

    def factor(self, kind: str) -> np.float32:
        """Return the one positive number of a tensor.

        Raises:
          InputError: as `get`; or it is zero, negative or not finite.
        """
        value = np.float32(self.get(kind, ("F32",), (), (1,)).reshape(-1)[0])
        if not (np.isfinite(value) and value > 0):
            raise InputError(f"tensor {self.tensors[kind].name} is {value}, but must be positive; use an intact checkpoint")
        return value


Reader = Callable[[Module], Packed]


def _listed(tensors: Mapping[str, Stored]) -> str:
    return ", ".join(stored.name for stored in tensors.values())
