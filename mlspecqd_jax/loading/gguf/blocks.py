"""The types of a GGUF file's tensors: bytes of blocks to codes, scales and minima, and by these to values or to a packed weight.

Notation: N rows, K elements of a row, g elements of a group, G = K / g. value[n, k] = element(code[n, k]) * scale[n, k // g] +
minimum[n, k // g]. In a file d, m and dmin are float16; a sub-block of a K-quant has scale d * s and minimum -dmin * m with small
whole s and m.

Source: ggml's ggml-common.h and ggml-quants.c, where blocks are structures and each type has its `dequantize_row`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (registers the small floats with numpy)
import numpy as np

from mlspecqd_jax.weights.formats import Format, Integer, format_of
from mlspecqd_jax.weights.halves import halves

AT_ONCE = 2**18  # elements that are decoded together, in a processor's cache
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Groups(NamedTuple):
    """Rows of a weight: a code for each element, and what each group's elements are multiplied by and added to."""

    codes: np.ndarray  # uint8 [N, K]
    scales: np.ndarray  # f32 [N, G]
    minima: np.ndarray | None = None  # f32 [N, G]


class Block(NamedTuple):
    """A type: so many elements in so many bytes; `decode` takes uint8 [N, blocks, bytes], and is None for floats."""

    name: str
    elements: int
    nbytes: int
    format: str | None = None  # a name that `format_of` knows, of weights with the same codes
    decode: Callable[[np.ndarray], Groups] | None = None


def values(block: Block, raw: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write the values of a tensor to `out` [N, K], rounded to its dtype once; `raw` is uint8 [N, blocks, bytes]."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported by whoever places the tensor
        for rows in _pieces(raw, block):
            out[rows] = _decoded(block, raw[rows]).astype(out.dtype)
    return out


def packed(block: Block, raw: np.ndarray) -> tuple[str, dict[str, np.ndarray]] | None:
    """Return the name of a format of quantized weights and its arrays by role, or None for a type of floats.

    Codes of four bits share a byte, element 2i in its low half. Scales and minima are float16, which K-quants' are rounded to, all
    of a tensor divided by one power of two, `tensor_scale`, where they would not fit; those of MXFP4 are as in the file.
    """
    if block.format is None or block.decode is None:
        return None
    format = format_of(block.format)
    with np.errstate(over="ignore", invalid="ignore"):
        pieces = [block.decode(np.asarray(raw[rows])) for rows in _pieces(raw, block)]
    codes, scales = (np.concatenate([getattr(piece, role) for piece in pieces]) for role in ("codes", "scales"))
    arrays = {"codes": codes[:, ::2] | codes[:, 1::2] << 4 if format.bits == 4 else codes}
    if format.scale == "e8m0":
        return block.format, arrays | {"scales": np.ascontiguousarray(raw[..., 0])}
    least = [piece.minima for piece in pieces if piece.minima is not None]
    return block.format, arrays | halves(scales, np.concatenate(least) if least else None)


def _pieces(raw: np.ndarray, block: Block) -> Iterator[slice]:
    rows = max(1, AT_ONCE // (raw.shape[1] * block.elements))
    return (slice(at, at + rows) for at in range(0, len(raw), rows))


def _decoded(block: Block, raw: np.ndarray) -> np.ndarray:
    """Return values, f32 [N, K]."""
    if block.format is None or block.decode is None:
        stored = np.ascontiguousarray(raw).view(FLOATS[block.name]).reshape(len(raw), -1)
        if block.name == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)
    codes, scales, minima = block.decode(np.asarray(raw))
    grouped = _elements(format_of(block.format), codes).reshape(*scales.shape, -1)
    grouped *= scales[..., None]
    if minima is not None:
        grouped += minima[..., None]
    return grouped.reshape(codes.shape)


def _elements(format: Format, codes: np.ndarray) -> np.ndarray:
    """Return the element of each code, f32."""
    if isinstance(format.element, Integer):
        return np.subtract(codes, np.float32(format.element.offset), dtype=np.float32)
    return codes.view(np.dtype(format.element.dtype)).astype(np.float32)


def _f16(raw: np.ndarray) -> np.ndarray:
    """Return float16 bytes [N, blocks, 2 * i] as f32 [N, blocks * i]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32).reshape(len(raw), -1)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Return bytes [N, blocks, 16] as codes [N, blocks, 32]: the low halves, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], -1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    """Return bytes [N, blocks, 4] as 16 or 0 [N, blocks, 32], bit i for element i."""
    return np.unpackbits(raw, axis=-1, bitorder="little") << 4


def _rows(codes: np.ndarray) -> np.ndarray:
    return codes.reshape(len(codes), -1)


def _q4_0(raw):
    return Groups(_rows(_nibbles(raw[..., 2:])), _f16(raw[..., :2]))


def _q4_1(raw):
    return Groups(_rows(_nibbles(raw[..., 4:])), _f16(raw[..., :2]), _f16(raw[..., 2:4]))


def _q5_0(raw):
    codes = _nibbles(raw[..., 6:]) | _fifth_bits(raw[..., 2:6])
    return Groups(_rows(codes + np.uint8(128 - 16)), _f16(raw[..., :2]))


def _q5_1(raw):
    codes = _nibbles(raw[..., 8:]) | _fifth_bits(raw[..., 4:8])
    return Groups(_rows(codes), _f16(raw[..., :2]), _f16(raw[..., 2:4]))


def _q8_0(raw):
    return Groups(_rows(raw[..., 2:] ^ 128), _f16(raw[..., :2]))  # two's complement


def _mxfp4(raw):
    exponents = raw[..., 0].astype(np.int32) - 127
    scales = np.ldexp(np.float32(1), np.minimum(exponents, 127))
    return Groups(_rows(_nibbles(raw[..., 1:])), np.where(exponents == 128, np.float32(np.nan), scales))


def _six_bits(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales and minima [N, blocks, 8] of a K-quant's sub-blocks, of six bits, from 12 bytes."""
    a, b, c = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    scales = np.concatenate([a & 63, c & 15 | (a >> 6) << 4], -1)
    minima = np.concatenate([b & 63, c >> 4 | (b >> 6) << 4], -1)
    return scales, minima


def _k_groups(raw: np.ndarray, codes: np.ndarray) -> Groups:
    """Return the groups of a K-quant whose blocks begin with d, dmin and the sub-blocks' scales and minima."""
    scales, minima = _six_bits(raw[..., 4:16])
    d, dmin = _f16(raw[..., :2])[..., None], _f16(raw[..., 2:4])[..., None]
    return Groups(_rows(codes), _rows(d * scales), _rows(-(dmin * minima)))


def _pairs(raw: np.ndarray) -> np.ndarray:
    """Return bytes [N, blocks, 128] as codes [N, blocks, 8, 32]: 32 bytes are two sub-blocks, low halves and high halves."""
    quarters = raw.reshape(*raw.shape[:2], 4, 1, 32)
    return np.concatenate([quarters & 15, quarters >> 4], -2).reshape(*raw.shape[:2], 8, 32)


def _q4_k(raw):
    return _k_groups(raw, _pairs(raw[..., 16:]))


def _q5_k(raw):
    eighths = np.arange(8, dtype=np.uint8)[:, None]
    fifth = raw[..., None, 16:48] >> eighths & 1  # bit j of byte i for element i of sub-block j
    return _k_groups(raw, _pairs(raw[..., 48:]) | fifth << 4)


def _q6_k(raw):
    low = raw[..., :128].reshape(*raw.shape[:2], 2, 1, 64)  # of each half of 128 elements
    low = np.concatenate([low & 15, low >> 4], -2).reshape(*raw.shape[:2], 2, 4, 32)
    high = raw[..., 128:192].reshape(*raw.shape[:2], 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    scales = np.ascontiguousarray(raw[..., 192:208]).view(np.int8)
    return Groups(_rows((low | high << 4) + np.uint8(128 - 32)), _rows(_f16(raw[..., 208:])[..., None] * scales))


BLOCKS = {
    0: Block("F32", 1, 4),
    1: Block("F16", 1, 2),
    2: Block("Q4_0", 32, 18, "int4", _q4_0),
    3: Block("Q4_1", 32, 20, "uint4_g32", _q4_1),
    6: Block("Q5_0", 32, 22, "int8_g32", _q5_0),
    7: Block("Q5_1", 32, 24, "uint8_g32", _q5_1),
    8: Block("Q8_0", 32, 34, "int8_g32", _q8_0),
    12: Block("Q4_K", 256, 144, "uint4_g32", _q4_k),
    13: Block("Q5_K", 256, 176, "uint8_g32", _q5_k),
    14: Block("Q6_K", 256, 210, "int8_g16", _q6_k),
    30: Block("BF16", 1, 2),
    39: Block("MXFP4", 32, 17, "mxfp4", _mxfp4),
}
TYPE_NAMES = {  # of what is not read
    **{9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL"},
    **{21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M"},
    **{34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0"},
}
