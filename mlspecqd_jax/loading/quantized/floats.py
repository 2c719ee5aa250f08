"""Small floats: MXFP4, NVFP4, and FP8 with a scale for the tensor, a row, or 128 x 128 elements; each method names its tensors.

Sources: OCP Microscaling Formats v1.0, and OCP 8-bit Floating Point v1.0 (E4M3 has no infinity; 0x7F and 0xFF are NaN).

Notation: N outputs, K contracted.
"""

import numpy as np

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.quantized.codes import every_group, filled
from mlspecqd_jax.loading.quantized.module import FLOATS, Module, Packed

TILE = 128
E4M3 = ("F8_E4M3",)


def mxfp4(module: Module, codes: str, scales: str) -> Packed:
    """Pairs of E2M1 codes [N, K / 2], element 2i in the low half, and the bytes of E8M0 scales [N, K / 32]."""
    n, k = module.shape
    exponents = module.get(scales, ("U8", "F8_E8M0"), (n, -(-k // 32)))
    if (exponents == 255).any():
        raise InputError(f"tensor {module.tensors[scales].name} holds NaN (byte 255); use an intact checkpoint")
    return Packed("mxfp4", {"codes": _pairs(module, codes), "scales": np.ascontiguousarray(exponents)})


def nvfp4(module: Module, codes: str, scales: str, factor: np.float32) -> Packed:
    """Pairs of E2M1 codes [N, K / 2], E4M3 scales [N, K / 16], and what all values are multiplied by."""
    n, k = module.shape
    found = _e4m3(module, scales, (n, -(-k // 16)))
    if (found > 127).any() or not found.any(axis=1).all():
        raise InputError(f"tensor {module.tensors[scales].name} holds a negative scale or a row of zeros; use an intact checkpoint")
    arrays = {"codes": _pairs(module, codes), "scales": every_group(found, 16, k)}
    return Packed("nvfp4", arrays | {"tensor_scale": np.full(1, factor, np.float32)})


def fp8(module: Module, codes: str, scales: str, tiled: bool) -> Packed:
    """E4M3 codes [N, K], and what they are multiplied by: in tiles, [N / 128, K / 128], or else one number, or one a row."""
    n, k = module.shape
    elements = filled(_e4m3(module, codes, (n, k)), 8, k)
    dtypes = (*FLOATS, "F8_E8M0", "U8")
    if tiled:
        found = module.scales(scales, (-(-n // TILE), -(-k // TILE)), dtypes=dtypes)
        return Packed("fp8_e4m3_128x128", {"codes": elements, "scales": found})
    found = module.scales(scales, (), (1,), (1, 1), (n,), (n, 1), dtypes=dtypes).reshape(-1, 1)
    if not found.all():
        raise InputError(f"tensor {module.tensors[scales].name} holds a scale of zero; use an intact checkpoint")
    return Packed("fp8_e4m3", {"codes": elements, "scales": np.broadcast_to(found, (n, 1)).copy()})


def _pairs(module: Module, kind: str) -> np.ndarray:
    n, k = module.shape
    return filled(module.get(kind, ("U8",), (n, -(-k // 2))), 4, k)


def _e4m3(module: Module, kind: str, shape: tuple[int, int]) -> np.ndarray:
    found = module.get(kind, E4M3, shape)
    if (found & 127 == 127).any():
        raise InputError(f"tensor {module.tensors[kind].name} holds NaN; use an intact checkpoint")
    return np.ascontiguousarray(found)
