"""Weight products and attention in C++ for the CPU, compiled on first use, with jax as the only dependency (floor 0)."""

from cpu_kernels.products import attention, bf16_matmul, isas, mx8_matmul, mxfp4_matmul, on_cpu, put_window, usable

__all__ = ["attention", "bf16_matmul", "isas", "mx8_matmul", "mxfp4_matmul", "on_cpu", "put_window", "usable"]
