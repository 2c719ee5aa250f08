"""Codes of four and eight bits between the words of files and the bytes of `QuantizedArray`.

Files put fields of b bits into int32 words, the least significant first. The bytes of such a word, which files write in that order
too, are the codes themselves at eight bits, and at four bits pairs of them, the first in the low half: what is stored here.

Notation: N outputs, K contracted; Kp is K rounded up to whole 32s.
"""

import numpy as np

from mlspecqd_jax.weights.formats import STEP


def bytes_of(words: np.ndarray) -> np.ndarray:
    """int32 [..., W] to the bytes of their words, uint8 [..., 4 W]."""
    return np.ascontiguousarray(words, "<i4").view(np.uint8)


def split(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [..., B] to one code each, uint8 [..., B * 8 / bits]."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def joined(codes: np.ndarray, bits: int) -> np.ndarray:
    """One code each, uint8 [N, K], to bytes as they are stored [N, Kp * bits / 8]."""
    k = codes.shape[1]
    if bits == 4:
        codes = np.pad(codes, ((0, 0), (0, k % 2)))
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return filled(codes, bits, k)


def filled(packed: np.ndarray, bits: int, k: int) -> np.ndarray:
    """Bytes of at least K codes a row to bytes as they are stored [N, Kp * bits / 8], zero from code K on."""
    width, size = -(-k * bits // 8), -(-k // STEP) * STEP * bits // 8
    packed = np.pad(packed[:, :width], ((0, 0), (0, size - width)))
    if bits == 4 and k % 2:
        packed[:, width - 1] &= 15
    return packed


def every_group(numbers: np.ndarray, group: int, k: int) -> np.ndarray:
    """Numbers of the groups of K codes [N, ceil(K / group)] to those of Kp codes, zero for groups of none but filled-up codes."""
    groups = -(-(-(-k // STEP) * STEP) // group)
    return np.pad(numbers, ((0, 0), (0, groups - numbers.shape[1])))
