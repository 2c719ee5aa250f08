"""Codes of six bits as they are stored a second time, element by element."""

import numpy as np


def _places(element: int) -> tuple[int, int, int, int]:
    """(byte and bit of the lower four bits, byte and bit of the upper two) of one of 32 elements, in their 24 bytes."""
    return element % 16, 4 * (element // 16), 16 + element % 8, 2 * (element // 8)


def joined(codes: np.ndarray) -> np.ndarray:
    """Codes one a byte [N, K], K a multiple of 32, to bytes as they are stored [N, 3K/4]."""
    blocks = codes.reshape(*codes.shape[:1], codes.shape[1] // 32, 32)
    out = np.zeros((*blocks.shape[:2], 24), np.uint8)
    for element in range(32):
        lower, at, upper, up = _places(element)
        out[..., lower] |= (blocks[..., element] & 15) << at
        out[..., upper] |= blocks[..., element] >> 4 << up
    return out.reshape(len(codes), codes.shape[1] * 6 // 8)


def split(stored: np.ndarray) -> np.ndarray:
    """Bytes as they are stored [N, 3K/4] to codes one a byte [N, K]."""
    blocks = stored.reshape(len(stored), stored.shape[1] // 24, 24)
    out = np.zeros((*blocks.shape[:2], 32), np.uint8)
    for element in range(32):
        lower, at, upper, up = _places(element)
        out[..., element] = blocks[..., lower] >> at & 15 | (blocks[..., upper] >> up & 3) << 4
    return out.reshape(len(stored), stored.shape[1] * 8 // 6)
