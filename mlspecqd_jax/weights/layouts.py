"""Weights arranged for the kernels of the chip that they are on, once, when they are loaded; nothing is kept as stored beside it.

Notation: N outputs, K contracted.
"""

import dataclasses
import functools

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlspecqd_jax.weights.formats import format_of
from mlspecqd_jax.weights.products import array_specs, parts_along
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import (
    OF_EXPERTS,
    PRODUCTS,
    RELYING_ON_SUBNORMALS,
    best_product,
    chip_of,
    honours_subnormals,
    named,
    why_not,
)
from pallas_kernels.tpu import DECODE
from pallas_kernels.xla import DECODED


def for_device(
    leaf: QuantizedArray,
    *,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None,
    product: str | None = None,
    experts: int | None = None,
) -> QuantizedArray:
    """Arrange a stored weight for the device or the mesh that it is on; it stays as it is where nothing there wants it otherwise.

    Args:
      leaf: as `quantize` made it, placed.
      dtype: of the activations.
      mesh: over which the leaf was placed, or None.
      product: the name of one; None takes the best that the chip supports.
      experts: of how many it holds the weights, one's rows after another's; None is of no expert.

    Raises:
      NotImplementedError: the product that was asked for cannot be had here; one sentence with the shapes.
    """
    device = next(iter(leaf.arrays["scales"].devices())) if mesh is None else mesh.devices.flat[0]
    if product is None:
        best = _best(device, str(jax.numpy.dtype(dtype)), leaf, _parts(leaf.spec, mesh), OF_EXPERTS if experts else PRODUCTS)
        if best is None or best is DECODED:  # which a stored leaf has already, or a better one in C++
            return leaf
        product = best.name
    return arrange(leaf, product, chip_of(device), dtype=dtype, mesh=mesh, experts=experts)


def arrange(
    leaf: QuantizedArray,
    product: str,
    chip: str,
    *,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None = None,
    experts: int | None = None,
) -> QuantizedArray:
    """Arrange a stored weight for one product on one chip.

    Args:
      leaf: as `quantize` made it; its spec says how N and K are split over the mesh.
      product: the name of one.
      chip: of `pallas_kernels.chip_of`.
      dtype: of the activations.
      mesh: over which the result is split.
      experts: as of `for_device`.

    Raises:
      NotImplementedError: the product does not take this; one sentence with the shapes.
    """
    along_n, along_k = _parts(leaf.spec, mesh)
    reason = why_not(product, chip, str(jax.numpy.dtype(dtype)), *leaf.shape, along_n, along_k, format=leaf.format)
    if reason is not None:
        raise NotImplementedError(reason)
    record = named(product)
    how = {"format": format_of(leaf.format), "along_n": along_n, "along_k": along_k} | ({"experts": experts} if experts else {})
    made = jax.eval_shape(functools.partial(record.arrange, **how), **leaf.core)
    specs = array_specs(record.axes, leaf.spec, made)
    placed = None if mesh is None else {role: NamedSharding(mesh, at) for role, at in specs.items()}
    arrays = jax.jit(record.arrange, static_argnames=tuple(how), out_shardings=placed)(**leaf.core, **how)
    return dataclasses.replace(leaf, arrays=arrays | leaf.around, product=product, chip=chip)


def _parts(spec: PartitionSpec, mesh: Mesh | None) -> tuple[int, ...]:
    return (1, 1) if mesh is None else tuple(parts_along(mesh, axis) for axis in spec)


def _best(device, dtype, leaf, parts, products):
    best = functools.partial(best_product, chip_of(device), dtype, *leaf.shape, *parts, format=leaf.format)
    product = best(products=products)
    if product not in RELYING_ON_SUBNORMALS or _honours_subnormals(device):
        return product
    return best(products=tuple(other for other in products if other not in RELYING_ON_SUBNORMALS))


@functools.cache
def _honours_subnormals(device):
    """Whether a TPU gets all codes right by the faster decoding; where the device is only described, it is taken to."""
    if device not in jax.local_devices():
        return True
    with jax.default_device(device):
        return honours_subnormals(
            lambda x, **arrays: DECODE.run(x, arrays, n=16, chip=chip_of(device), format=None, interpret=False)
        )
