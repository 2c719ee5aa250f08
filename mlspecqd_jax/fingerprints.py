"""`fingerprint`: the name of all that a compiled program depends on, told without tracing it.

These are the function, what it is given as far as a trace sees it (shapes and types of arrays, all else by its value), how it is
compiled, this package's source, the versions and settings of jax, the environment, the device and the processor.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import sys
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

OWN = ("mlspecqd_jax", "cpu_kernels", "pallas_kernels")
VARIABLES = ("CUDA", "CXX", "JAX_", "LIBTPU", "MLSPECQD_", "NVIDIA", "OMP_", "TF_", "TPU_", "XLA_")
# Settings that say where compiled programs are kept, and in which cases.
OF_CACHES = ("jax_compilation_cache", "jax_enable_compilation_cache", "jax_persistent_cache")


class UnknownError(Exception):
    """A value whose part in a program nobody can tell, such as an object of the caller's own class."""


def fingerprint(name: str, arguments: Any, options: Any) -> str:
    """Return the name of a program.

    Args:
      name: of the function.
      arguments: what it is given, static values among them.
      options: how it is compiled.

    Raises:
      UnknownError: what the program is cannot be told by the arguments.
    """
    device = device_of(arguments)
    facts = (
        name,
        spelled(arguments),
        spelled(options),
        source(),
        (jax.__version__, jaxlib.__version__, sys.version_info[:3], np.__version__),
        (device.platform, device.device_kind, device.id, device.client.platform_version, jax.device_count(), jax.default_backend()),
        processor(),
        repr(settings()),
        sorted(pair for pair in os.environ.items() if pair[0].startswith(VARIABLES)),
        str(jax.sharding.get_abstract_mesh()),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def settings() -> tuple[Any, ...]:
    """Return the values of all settings of jax here and now, but for where and what it keeps itself."""
    found = jax.config.values
    return tuple(getattr(jax.config, key, found[key]) for key in sorted(found) if not key.startswith(OF_CACHES))


def device_of(arguments: Any) -> jax.Device:
    """Return the one device where arrays are.

    Raises:
      UnknownError: there are several, or none.
    """
    devices = {device for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    if len(devices) != 1:
        raise UnknownError(f"{len(devices)} devices")
    return devices.pop()


def spelled(value: Any) -> Any:
    """Return what a trace sees of a value, as tuples of texts and numbers.

    Raises:
      UnknownError: a part of it is of a class of somebody else's.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes):
        return (kind.__name__, repr(value))
    if isinstance(value, Tracer):
        raise UnknownError("a tracer")
    if isinstance(value, jax.Array):
        return ("array", value.shape, str(value.dtype), value.weak_type)
    if isinstance(value, (np.ndarray, np.generic)):
        return ("array", value.shape, str(value.dtype), False)
    if kind in (tuple, list, PartitionSpec):
        return (kind.__name__, *map(spelled, value))
    if kind is dict:
        return ("dict", *((spelled(key), spelled(value[key])) for key in value))
    if kind.__module__.split(".")[0] in OWN:
        fields = getattr(kind, "_fields", None)
        if dataclasses.is_dataclass(value):
            fields = [field.name for field in dataclasses.fields(value) if not field.metadata.get("unread")]
        if fields is not None:
            return (f"{kind.__module__}.{kind.__qualname__}", *(spelled(getattr(value, field)) for field in fields))
    raise UnknownError(f"{kind.__module__}.{kind.__qualname__}")


@functools.cache
def source() -> str:
    """Return a digest of this package's files, those in C++ among them."""
    above, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for package in OWN:
        for path in sorted(path for path in (above / package).rglob("*") if path.suffix in (".py", ".cc", ".h", ".inc")):
            digest.update(f"{path.relative_to(above)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def processor() -> tuple[Any, ...]:
    """Return what the processor is called and can do, and on how many cores this process may run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (processor_name(), platform.machine(), _of_processor("flags", "Features"), cores)


def processor_name() -> str:
    """Return what the processor is called."""
    return _of_processor("model name") or platform.processor()


@functools.cache
def _of_processor(*keys: str) -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(keys))
    except (OSError, StopIteration):
        return ""
