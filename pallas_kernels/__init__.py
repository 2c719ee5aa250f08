"""Weight products over plain arrays, with jax as the only dependency (floor 0)."""

from pallas_kernels.reference import BLOCK, bf16_matmul, mx_decode, mx_matmul, mxfp4_matmul
from pallas_kernels.selection import LAYOUTS, chip_of, choose, laid_out_matmul, lay_out, unsupported
from pallas_kernels.tpu import honours_subnormals

__all__ = [
    "BLOCK",
    "LAYOUTS",
    "bf16_matmul",
    "chip_of",
    "choose",
    "honours_subnormals",
    "laid_out_matmul",
    "lay_out",
    "mx_decode",
    "mx_matmul",
    "mxfp4_matmul",
    "unsupported",
]
