"""Weight products over plain arrays, with jax as the only dependency (floor 0)."""

from pallas_kernels.reference import BLOCK, bf16_matmul, mx_decode, mx_matmul, mxfp4_matmul

__all__ = ["BLOCK", "bf16_matmul", "mx_decode", "mx_matmul", "mxfp4_matmul"]
