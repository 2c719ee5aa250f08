"""Weight products over plain arrays, with jax as the only dependency (floor 0)."""

from pallas_kernels.reference import bf16_matmul

__all__ = ["bf16_matmul"]
