"""Weight products, norms and attention in C++ for the CPU, compiled on first use, with jax as the only dependency (floor 0)."""

from cpu_kernels.products import attention, dense_matmul, isas, mx8_matmul, mxfp4_matmul, on_cpu, put_window, rms_norm, usable

__all__ = ["attention", "dense_matmul", "isas", "mx8_matmul", "mxfp4_matmul", "on_cpu", "put_window", "rms_norm", "usable"]
