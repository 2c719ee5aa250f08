"""MXFP4 weights laid out for the kernels of the chip that they are on, once, when they are loaded.

On CPU nothing changes. Elsewhere the laid out leaf takes the stored one's place. Notation: N outputs, K contracted.
"""

import dataclasses
import functools

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlspecqd_jax.weights.mx import MXArray, MXFP4Array
from mlspecqd_jax.weights.placement import weight_sharding
from pallas_kernels import LAYOUTS, chip_of, choose, honours_subnormals, laid_out_matmul, lay_out, unsupported


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("shape", "product", "chip", "spec"))
@dataclasses.dataclass(frozen=True, eq=False)
class LaidOut:
    """An MXFP4 weight as one product reads it, possibly split over a mesh."""

    arrays: tuple[jax.Array, ...]
    shape: tuple[int, int]  # N, K
    product: str  # a key of pallas_kernels.LAYOUTS
    chip: str
    spec: PartitionSpec  # how N and K are split

    format = "mxfp4"

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def array_specs(self) -> tuple[PartitionSpec, ...]:
        """How the arrays are split."""
        return _array_specs(self.product, self.spec)


def for_device(
    axes: tuple[str | None, ...],
    leaf: MXFP4Array | MXArray,
    *,
    dtype: jax.numpy.dtype,
    mesh: Mesh | None,
    product: str | None = None,
) -> MXFP4Array | MXArray | LaidOut:
    """Lay out a weight for the device or the mesh that it is on; on CPU, and in another format, it stays as it is.

    Args:
      axes: over which the weight may be split (`tensors.Tensor`).
      leaf: as `quantize` made it.
      dtype: of the activations.
      mesh: over which the leaf was placed, or None.
      product: a key of pallas_kernels.LAYOUTS; None takes the best that the chip supports.

    Raises:
      NotImplementedError: the product that was asked for cannot be had here; one sentence with the shapes.
    """
    if not isinstance(leaf, MXFP4Array):
        return leaf
    device = next(iter(leaf.packed.devices())) if mesh is None else mesh.devices.flat[0]
    chip = chip_of(device)
    if chip == "cpu" and product is None:
        return leaf
    spec = None if mesh is None else weight_sharding(axes, leaf.scales.shape, mesh).spec
    product = product or _best(device, str(jax.numpy.dtype(dtype)), leaf.shape, _parts(spec, mesh))
    return laid_out(leaf, product, chip, dtype=dtype, mesh=mesh, spec=spec)


def laid_out(
    leaf: MXFP4Array,
    product: str,
    chip: str,
    *,
    dtype: jax.numpy.dtype,
    mesh: Mesh | None = None,
    spec: PartitionSpec | None = None,
) -> LaidOut:
    """Lay out a weight for one product on one chip.

    Args:
      leaf: as `quantize` made it.
      product: a key of pallas_kernels.LAYOUTS.
      chip: of `pallas_kernels.chip_of`.
      dtype: of the activations.
      mesh: over which the result is split.
      spec: how N and K are split over it; None keeps both whole.

    Raises:
      NotImplementedError: the product does not take this; one sentence with the shapes.
    """
    spec = PartitionSpec(None, None) if spec is None else spec
    parts = _parts(spec, mesh)
    reason = unsupported(product, chip, str(jax.numpy.dtype(dtype)), *leaf.shape, *parts)
    if reason is not None:
        raise NotImplementedError(reason)
    placed = None if mesh is None else tuple(NamedSharding(mesh, entry) for entry in _array_specs(product, spec))
    run = jax.jit(lay_out, static_argnums=(0, 3, 4), out_shardings=placed)
    return LaidOut(run(product, leaf.packed, leaf.scales, *parts), leaf.shape, product, chip, spec)


def laid_out_product(x: jax.Array, w: LaidOut, interpret=False) -> jax.Array:
    """x [M, K] times the transpose of a laid out weight, f32 [M, N]; under a mesh, each device multiplies its part."""
    mesh = jax.sharding.get_abstract_mesh()
    along_n, along_k = w.spec
    if mesh.empty:
        return laid_out_matmul(w.product, x, w.arrays, w.shape[0], w.chip, interpret)
    n = w.shape[0] // _size(mesh, along_n)

    def part(x, *arrays):
        y = laid_out_matmul(w.product, x, arrays, n, w.chip, interpret)
        return y if along_k is None else jax.lax.psum(y, along_k)

    # A compiler splits no Pallas kernel by itself. Each result is one that it cannot check to be alike on all devices.
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(PartitionSpec(None, along_k), *w.array_specs),
        out_specs=PartitionSpec(None, along_n),
        check_vma=False,
    )(x, *w.arrays)


def _array_specs(product, spec):
    along = dict(zip(("n", "k"), spec, strict=True)) | {None: None}
    return tuple(PartitionSpec(*(along[axis] for axis in axes)) for axes in LAYOUTS[product])


def _parts(spec, mesh):
    return (1, 1) if mesh is None else tuple(_size(mesh, axis) for axis in spec)


def _size(mesh, axis):
    return 1 if axis is None else mesh.shape[axis]


def _best(device, dtype, shape, parts):
    product = choose(chip_of(device), dtype, *shape, *parts)
    return "tpu without subnormals" if product == "tpu" and not _honours_subnormals(device) else product


@functools.cache
def _honours_subnormals(device):
    """Whether a TPU gets all codes right by the faster decoding; where the device is only described, it is taken to."""
    if device not in jax.local_devices():
        return True
    with jax.default_device(device):
        return honours_subnormals(lambda x, *arrays: laid_out_matmul("tpu", x, arrays, 16, chip_of(device)))
