"""Weight products, norms and attention in C++ for the CPU, compiled on first use, with jax as the only dependency (floor 0)."""

from cpu_kernels.library import isas, on_cpu, usable
from cpu_kernels.operations import angles, attention, layer_norm, put_window, rms_norm, rotate
from cpu_kernels.products import dense_matmul, grouped_matmul, mx8_matmul, mxfp4_matmul, mxfp6_matmul

__all__ = [
    "angles",
    "attention",
    "dense_matmul",
    "grouped_matmul",
    "isas",
    "layer_norm",
    "mx8_matmul",
    "mxfp4_matmul",
    "mxfp6_matmul",
    "on_cpu",
    "put_window",
    "rms_norm",
    "rotate",
    "usable",
]
