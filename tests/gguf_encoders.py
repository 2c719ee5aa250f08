"""Weights to the blocks of a GGUF file, each group's elements to the nearest that its scale allows; K-quants by their formulas.

Each function takes float32 [N, K], K a multiple of the block's elements, and returns uint8 [N, blocks, bytes].
"""

import numpy as np


def _groups(w, size):
    return w.reshape(len(w), -1, size)


def _f16(x):
    """float32 [N, blocks] to what float16 holds of it, and to its bytes."""
    half = x.astype(np.float16)
    return half.astype(np.float32)[..., None], half[..., None].view(np.uint8)


def _codes(x, scale, least, most):
    steps = np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)
    return np.clip(np.rint(steps), least, most).astype(np.int32)


def _nibbles(codes):
    """Codes [N, blocks, 32]: bytes of the first half's low four bits and the second half's."""
    return (codes[..., :16] & 15 | (codes[..., 16:] & 15) << 4).astype(np.uint8)


def _fifth(codes):
    return np.packbits((codes >> 4 & 1).astype(np.uint8), axis=-1, bitorder="little")


def _largest(b):
    """The element of largest magnitude of each group."""
    return np.take_along_axis(b, np.abs(b).argmax(-1, keepdims=True), -1)[..., 0]


def q8_0(w):
    b = _groups(w, 32)
    d, raw = _f16(np.abs(b).max(-1) / 127)
    return np.concatenate([raw, _codes(b, d, -127, 127).astype(np.int8).view(np.uint8)], -1)


def _signed(w, half, extra):
    b = _groups(w, 32)
    d, raw = _f16(_largest(b) / -half)
    codes = _codes(b, d, -half, half - 1) + half
    return np.concatenate([raw, *extra(codes), _nibbles(codes)], -1)


def _with_minimum(w, most, extra):
    b = _groups(w, 32)
    (d, raw), (m, least) = _f16((b.max(-1) - b.min(-1)) / most), _f16(b.min(-1))
    codes = _codes(b - m, d, 0, most)
    return np.concatenate([raw, least, *extra(codes), _nibbles(codes)], -1)


def q4_0(w):
    return _signed(w, 8, lambda codes: [])


def q5_0(w):
    return _signed(w, 16, lambda codes: [_fifth(codes)])


def q4_1(w):
    return _with_minimum(w, 15, lambda codes: [])


def q5_1(w):
    return _with_minimum(w, 31, lambda codes: [_fifth(codes)])


def mxfp4(w):
    b = _groups(w, 32)
    exponent = np.frexp(np.abs(b).max(-1))[1] - 3
    elements = np.abs(b / np.exp2(exponent)[..., None])[..., None] - np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.abs(elements).argmin(-1) | np.where(b < 0, 8, 0)
    return np.concatenate([(exponent + 127).astype(np.uint8)[..., None], _nibbles(codes)], -1)


def _k_quant(w, most, high):
    """Scales and minima of six bits for eight sub-blocks of 32, then codes of two sub-blocks in 32 bytes."""
    b = w.reshape(len(w), -1, 8, 32)
    least = np.minimum(b.min(-1), 0)
    step = (b.max(-1) - least) / most
    (d, raw), (dmin, raw_min) = _f16(step.max(-1) / 63), _f16(-least.min(-1) / 63)
    s, m = _codes(step, d, 0, 63), _codes(-least, dmin, 0, 63)
    codes = _codes(b + (dmin * m)[..., None], (d * s)[..., None], 0, most)
    six = np.empty((*s.shape[:2], 12), np.uint8)
    six[..., :4] = s[..., :4] | (s[..., 4:] >> 4) << 6
    six[..., 4:8] = m[..., :4] | (m[..., 4:] >> 4) << 6
    six[..., 8:] = s[..., 4:] & 15 | (m[..., 4:] & 15) << 4
    pairs = (codes[:, :, ::2] & 15 | (codes[:, :, 1::2] & 15) << 4).reshape(*s.shape[:2], 128).astype(np.uint8)
    fifth = (codes >> 4 & 1) << np.arange(8)[:, None]
    return np.concatenate([raw, raw_min, six, *([fifth.sum(2).astype(np.uint8)] if high else []), pairs], -1)


def q4_k(w):
    return _k_quant(w, 15, high=False)


def q5_k(w):
    return _k_quant(w, 31, high=True)


def q6_k(w):
    b = w.reshape(len(w), -1, 16, 16)
    step = _largest(b) / -32
    d, raw = _f16(np.abs(step).max(-1) / 127)
    s = _codes(step, d, -128, 127)
    codes = (_codes(b, (d * s)[..., None], -32, 31) + 32).reshape(len(w), -1, 2, 4, 32)  # quarters of halves
    low = (codes[:, :, :, :2] & 15 | (codes[:, :, :, 2:] & 15) << 4).reshape(*s.shape[:2], 128)
    high = (codes >> 4 << np.arange(0, 8, 2)[:, None]).sum(3).reshape(*s.shape[:2], 64)
    return np.concatenate([low.astype(np.uint8), high.astype(np.uint8), s.astype(np.int8).view(np.uint8), raw], -1)


ENCODERS = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "MXFP4": mxfp4}
ENCODERS |= {"Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


def encode(tensor: tuple, kind: str) -> tuple:
    """Return a tensor of F32 as `gguf_files.write` takes it in another type; a vector stays as it is."""
    _, raw, shape = tensor
    return tensor if len(shape) == 1 else (kind, ENCODERS[kind](raw.view(np.float32).reshape(shape)).reshape(-1), shape)
