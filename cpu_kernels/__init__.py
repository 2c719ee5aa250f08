"""Weight products in C++ for the CPU, compiled on first use, with jax as the only dependency (floor 0)."""

from cpu_kernels.products import bf16_matmul, isas, mxfp4_matmul

__all__ = ["bf16_matmul", "isas", "mxfp4_matmul"]
