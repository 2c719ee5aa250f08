"""Where the weights and caches of a model lie: on a device, over a mesh (tensor parallelism), or on a CPU in huge pages.

Over a mesh a weight is split as its `axes` say (`tensors.Tensor`), a cache by head. Every pass over a model reads all of its
weights. Through pages of 4 KB a processor spends part of that time on finding the next page, and it fetches ahead to the end of one
only.
"""

import mmap

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.weights.tensors import AXIS

HUGE_PAGE = 2**21  # bytes
CACHE = (None, AXIS, None, None)  # [B, Hkv, S, D]


def usable_mesh(mesh: Mesh | None) -> Mesh | None:
    """Check that a mesh has the axis `model` and return it with automatic axis types (GSPMD decides what the axes leave open)."""
    if mesh is None:
        return None
    if AXIS not in mesh.axis_names:
        raise InputError(
            f"mesh has axes {mesh.axis_names}, but weights are split over an axis named '{AXIS}'; "
            f"make one with jax.make_mesh((n_devices,), ('{AXIS}',))"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def weight_sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Placement of a weight that may be split over `axes`; a dimension that the mesh axis does not divide stays whole."""
    entries = (axis if axis is None or shape[i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(axes))
    return NamedSharding(mesh, PartitionSpec(*entries))


def cache_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Placement of one layer's keys or values [B, Hkv, S, D]: split by head where the heads divide."""
    return weight_sharding(CACHE, shape, mesh)


def place(array: np.ndarray | jax.Array, sharding: Sharding | None = None) -> jax.Array:
    """Put an array where a sharding says, or on the default device; on a CPU, in huge pages if it fills one.

    Linux gives huge pages to memory for which they are asked before it is written, so this copies. Other systems have no such
    request, and there it is `jax.device_put`.
    """
    if sharding is None and jax.default_backend() == "cpu" and hasattr(mmap, "MADV_HUGEPAGE") and array.nbytes >= HUGE_PAGE:
        array = _in_huge_pages(np.asarray(array))  # on a page's edge, hence used by device_put as it is
    return jax.device_put(array, sharding)


def _in_huge_pages(array: np.ndarray) -> np.ndarray:
    memory = mmap.mmap(-1, array.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy
