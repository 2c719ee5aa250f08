"""Weight products over plain arrays, with jax as the only dependency (floor 0)."""

from pallas_kernels.experts import each_by_each, hit_by_hit, hits
from pallas_kernels.product import PLAIN, Product
from pallas_kernels.products import (
    OF_EXPERTS,
    OF_PLAIN_EXPERTS,
    PRODUCTS,
    RELYING_ON_SUBNORMALS,
    best_product,
    chip_in_use,
    chip_of,
    named,
    why_not,
)
from pallas_kernels.reference import (
    BLOCK,
    bf16_matmul,
    code_values,
    decode,
    element_values,
    group_values,
    mx_decode,
    mx_matmul,
    mxfp4_matmul,
    number_of_scale,
    unpacked,
)
from pallas_kernels.tpu import honours_subnormals

__all__ = [
    "BLOCK",
    "OF_EXPERTS",
    "OF_PLAIN_EXPERTS",
    "PLAIN",
    "PRODUCTS",
    "RELYING_ON_SUBNORMALS",
    "Product",
    "best_product",
    "bf16_matmul",
    "chip_in_use",
    "chip_of",
    "code_values",
    "decode",
    "each_by_each",
    "element_values",
    "group_values",
    "hit_by_hit",
    "hits",
    "honours_subnormals",
    "mx_decode",
    "mx_matmul",
    "mxfp4_matmul",
    "named",
    "number_of_scale",
    "unpacked",
    "why_not",
]
