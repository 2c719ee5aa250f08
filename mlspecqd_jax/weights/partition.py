"""Where each tensor lives on a device mesh: one table for weights, one entry for caches (tensor parallelism).

Notation: N outputs, K contracted, V vocabulary. A weight is split over the mesh axis named `model` along N where its
output feeds heads or the MLP's middle, along K where its input comes from there (one all-reduce follows).
"""

import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlspecqd_jax.errors import InputError

AXIS = "model"

WEIGHTS: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(embed_tokens|lm_head)\.weight", PartitionSpec(AXIS, None)),  # [V, K]
    (r"(q|k|v|gate|up)_proj\.weight", PartitionSpec(AXIS, None)),  # [N, K]
    (r"(q|k|v|gate|up)_proj\.bias", PartitionSpec(AXIS)),  # [N]
    (r"(o|down)_proj\.weight", PartitionSpec(None, AXIS)),  # [N, K]
    (r".*", PartitionSpec()),
)
CACHE = PartitionSpec(None, AXIS, None, None)  # [B, Hkv, S, D]


def usable_mesh(mesh: Mesh | None) -> Mesh | None:
    """Check that a mesh has the axis `model` and return it with automatic axis types (GSPMD decides what the table leaves open)."""
    if mesh is None:
        return None
    if AXIS not in mesh.axis_names:
        raise InputError(
            f"mesh has axes {mesh.axis_names}, but weights are split over an axis named '{AXIS}'; "
            f"make one with jax.make_mesh((n_devices,), ('{AXIS}',))"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def weight_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Placement of the weight called `name`; a dimension that the mesh axis does not divide stays whole."""
    spec = next(spec for pattern, spec in WEIGHTS if re.search(pattern + "$", name))
    return _fitting(spec, shape, mesh)


def cache_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Placement of one layer's keys or values [B, Hkv, S, D]: split by head where the heads divide."""
    return _fitting(CACHE, shape, mesh)


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    size = mesh.shape[AXIS]
    entries = (axis if axis is None or shape[i] % size == 0 else None for i, axis in enumerate(spec))
    return jax.sharding.NamedSharding(mesh, PartitionSpec(*entries))
