"""`QuantizedArray`: a weight in few bits, the one kind of leaf beside a plain array.

Notation: N outputs, K contracted, K32 is K rounded up to whole 32s, the rest being zero elements, G groups along K.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.weights.formats import format_of
from pallas_kernels import PLAIN

STORED, WHOLE = "stored", PartitionSpec(None, None)
# What a product does not see: K is put into this order before it, its results are multiplied by these numbers, and to them is added
# an amount of those of another weight (`probe`); what it is given is added up (`watch`).
AROUND = ("order", "row_scale", "tensor_scale", "change", "amount", "moments", "counted")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("shape", "format", "product", "spec", "chip")
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A weight [N, K] in some format, as it is stored or as one product reads it, possibly split over a mesh.

    As stored, `arrays` holds "codes", uint8 [N, K32 * bits / 8], as `formats` says, "scales" [ceil(N / rows), G] in the format's
    type, and, if the format has them, "minima", float16 [N, G]. A weight of any format may also have "order", int32 [K] (codes of
    column j belong to column order[j] of the weight), "row_scale", float32 [N], and "tensor_scale", float32 [1], of which all is a
    multiple.
    """

    arrays: dict[str, jax.Array]  # by role
    shape: tuple[int, int]  # N, K
    format: str  # a name that `formats.format_of` knows
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
    def core(self) -> dict[str, jax.Array]:
        """The arrays that a product reads."""
        return {role: array for role, array in self.arrays.items() if role not in AROUND}

    @property
    def around(self) -> dict[str, jax.Array]:
        """The other ones."""
        return {role: array for role, array in self.arrays.items() if role in AROUND}

    @property
    def elements(self) -> jax.Array:
        """The elements of a stored weight in XLA's type [N, K32] (on CPU a float4 takes a whole byte too).

        Raises:
          InputError: the format is one of six bits or of integers with an offset, for which XLA has no type.
        """
        dtype = getattr(format_of(self.format).element, "dtype", None)
        if dtype is None:
            raise InputError(f"XLA has no type for the elements of {self.format}; read .arrays['codes'], or dequantize the array")
        return jax.lax.bitcast_convert_type(self.arrays["codes"], jnp.dtype(dtype)).reshape(self.shape[0], -1)

    @property
    def scales_e8m0(self) -> jax.Array:
        """The scales of a stored weight in an MX format as float8_e8m0fnu [N, K32 / 32]."""
        return jax.lax.bitcast_convert_type(self.arrays["scales"], jnp.float8_e8m0fnu)


def probe(w: jax.Array, change: jax.Array, amount: jax.Array) -> QuantizedArray:
    """Return a leaf whose product is x @ w.T + amount * (x @ change.T), with an amount f32 [M] for each row of x [M, K].

    The derivative by an amount of 0 is what a little of the change would do to a function of that row's result.
    """
    return QuantizedArray({"weight": w, "change": change, "amount": amount}, (w.shape[0], w.shape[1]), PLAIN)


def watch(w: jax.Array, moments: jax.Array, counted: jax.Array) -> QuantizedArray:
    """Return a leaf whose product is x @ w.T, and lets one know what x [M, K] was.

    The derivative by moments, f32 [K, K], of whatever is made of the product, is the sum over rows of x x^T, each as often as it is
    counted, f32 [M].
    """
    return QuantizedArray({"weight": w, "moments": moments, "counted": counted}, (w.shape[0], w.shape[1]), PLAIN)


Leaf = jax.Array | QuantizedArray  # what a model's parameters are
