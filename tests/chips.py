"""Chips that are not here, described to their compilers, and what these tell of a program."""

import contextlib
import importlib.util
import os
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs on a TPU, so that test processes need not take turns
GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {most_shared} cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "NVIDIA {name}"
"""
KEYS = ("capability", "cores", "units", "threads", "shared", "most_shared", "l2", "bandwidth", "memory", "clock")
# Of public data sheets.
NINE = "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES"
GPUS = {
    "H200": (NINE, 132, 128, 2048, 233472, 232448, 52428800, 4800000000000, 150000000000, 1.98),
    "A100": ("major: 8 minor: 0", 108, 64, 2048, 167936, 166912, 41943040, 2039000000000, 85000000000, 1.41),
    "L4": ("major: 8 minor: 9", 58, 128, 1536, 102400, 101376, 50331648, 300000000000, 24000000000, 2.04),
    "T4": ("major: 7 minor: 5", 40, 64, 1024, 65536, 65536, 4194304, 320000000000, 15800000000, 1.59),
}
# Memory of one device in bytes.
MEMORY = {"v5e": 16 << 30, "v6e": 32 << 30, "v5p": 95 << 30} | {name: facts[8] for name, facts in GPUS.items()}
ON_CHIP = {"v5e": 128 << 20, "v6e": 128 << 20}  # which a TPU's compiler fills with what it reads ahead, and counts as temporary


def mesh(name: str) -> Mesh:
    """Return the devices of a name such as v5e:2x2 or H200 with the axis `model`; a test is skipped where no compiler for it is."""
    if name in GPUS:
        facts = GPU.format(name=name, **dict(zip(KEYS, GPUS[name], strict=True)))
        chip = {"platform": "cuda", "target_config": facts, "topology": "1x1x1"}
    else:
        chip = {"platform": "tpu", "topology_name": name}
        if re.search(r":1x1(x1)?$", name):
            chip["chips_per_host_bounds"] = (1, 1, 1)
    package = "jax_cuda12_plugin" if name in GPUS else "libtpu"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no compiler for {name} here ({package}); install the aot extra")
    devices = topologies.get_topology_desc(**chip).devices
    if name in GPUS or "chips_per_host_bounds" in chip:
        devices = devices[:1]
    return Mesh(np.array(devices), ("model",), axis_types=(AxisType.Auto,))


def compile_for(mesh: Mesh, function, *arguments, compiler_options=None, **options):
    """Compile a function for a mesh; arguments without a sharding are whole on every device."""
    with context(mesh):
        return (
            jax.jit(function, **options).trace(*placed(mesh, arguments)).lower().compile(settings(mesh) | (compiler_options or {}))
        )


def placed(mesh: Mesh, arguments):
    """Return abstract arrays, of which those without a sharding are whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: x if x.sharding is not None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments
    )


def settings(mesh: Mesh) -> dict:
    """Return the compiler's options for a mesh: on a GPU that is not here there is nothing to time on."""
    return {"xla_gpu_autotune_level": 0} if mesh.devices.flat[0].platform == "gpu" else {}


def context(mesh: Mesh | None):
    """Return the context in which a program for a mesh is traced."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
