"""`QuantizedArray`: a weight in few bits, the one kind of leaf beside a plain array.

Notation: N outputs, K contracted, K32 is K rounded up to whole groups, the rest being zero elements.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.weights.formats import FORMATS

STORED, WHOLE = "stored", PartitionSpec(None, None)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("shape", "format", "product", "spec", "chip")
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A weight [N, K] in a format of `FORMATS`, as it is stored or as one product reads it, possibly split over a mesh.

    As stored, `arrays` holds "codes", uint8 [N, K32 / codes_per_byte], and "scales", uint8 [N, K32 / 32].
    """

    arrays: dict[str, jax.Array]  # by role
    shape: tuple[int, int]  # N, K
    format: str  # a name of FORMATS
    product: str = STORED  # or the name of the product for which it is arranged
    spec: PartitionSpec = WHOLE  # how N and K are split
    chip: str | None = None  # of pallas_kernels.chip_of, for which it is arranged

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def is_stored(self) -> bool:
        return self.product == STORED

    @property
    def elements(self) -> jax.Array:
        """The elements of a stored weight in XLA's type [N, K32] (on CPU a float4 takes a whole byte too).

        Raises:
          InputError: the format is one of six bits, for which XLA has no type.
        """
        dtype = FORMATS[self.format].element.dtype
        if dtype is None:
            raise InputError(f"XLA has no type for the elements of {self.format}; read .arrays['codes'], or dequantize the array")
        return jax.lax.bitcast_convert_type(self.arrays["codes"], jnp.dtype(dtype)).reshape(self.shape[0], -1)

    @property
    def scales_e8m0(self) -> jax.Array:
        """The scales of a stored weight as float8_e8m0fnu [N, K32 / 32]."""
        return jax.lax.bitcast_convert_type(self.arrays["scales"], jnp.float8_e8m0fnu)


Leaf = jax.Array | QuantizedArray  # what a model's parameters are
