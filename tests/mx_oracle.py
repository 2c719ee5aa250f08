"""The MX formats a second time, by search in tables of values in float64: what `mxfp4` is compared with, bit for bit."""

import functools

import ml_dtypes
import numpy as np

# The element types, as ml_dtypes spells out their values; mantissa bits.
ELEMENTS = {
    "mxfp4": (ml_dtypes.float4_e2m1fn, 1),
    "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 3),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 2),
    "mxfp8_e4m3": (ml_dtypes.float8_e4m3fn, 3),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 2),
}
RULES = ("floor", "ceil", "rceil", "even")


@functools.cache
def table(format: str) -> np.ndarray:
    """Values of the codes 0, 1, ... without sign, ascending, finite ones only, float64."""
    dtype, _ = ELEMENTS[format]
    values = np.arange(2 ** (ml_dtypes.finfo(dtype).bits - 1), dtype=np.uint8).view(dtype).astype(np.float64)
    return values[np.isfinite(values)]


def exponent(amax: float, format: str, rule: str) -> int:
    """The exponent of a block's scale before it is cut off at -127; amax > 0."""

    def floor_log2(x):
        return int(np.frexp(x)[1]) - 1

    largest = table(format)[-1]
    e = floor_log2(amax) - floor_log2(largest)
    if rule == "ceil":
        e += amax != 2.0 ** floor_log2(amax)
    elif rule == "rceil":
        e += amax > largest * 2.0**e
    elif rule == "even":
        step = 2.0 ** (floor_log2(amax) - ELEMENTS[format][1])
        e = floor_log2(np.floor(amax / step + 0.5) * step) - floor_log2(largest)
    return e


def quantize(w: np.ndarray, format: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes uint8 [N, K32], one a byte; scales uint8 [N, K32 / 32]) of a finite weight [N, K]."""
    w = np.asarray(w).astype(np.float64)
    w = np.pad(w, ((0, 0), (0, -w.shape[1] % 32)))
    blocks = w.reshape(len(w), -1, 32)
    amax = np.abs(blocks).max(axis=-1)
    scales = np.array([0 if a == 0 else np.clip(exponent(a, format, rule) + 127, 0, 254) for a in amax.ravel()], np.int64)
    scales = scales.reshape(amax.shape)
    values = table(format)
    v = np.abs(blocks) / 2.0 ** (scales[..., None] - 127)
    below = np.clip(np.searchsorted(values, v, side="right") - 1, 0, len(values) - 2)
    to_below, to_above = v - values[below], values[below + 1] - v
    up = (to_above < to_below) | ((to_above == to_below) & (below % 2 == 1))
    sign = np.signbit(blocks).astype(np.int64) << ml_dtypes.finfo(ELEMENTS[format][0]).bits - 1
    return ((below + up) | sign).astype(np.uint8).reshape(w.shape), scales.astype(np.uint8)


def dequantize(codes: np.ndarray, scales: np.ndarray, format: str) -> np.ndarray:
    """Values in float64 of codes [N, K32] of finite elements; scale byte 0 and what is below 2^-126 is 0, from 2^128 on inf."""
    values = codes.view(ELEMENTS[format][0]).astype(np.float64).reshape(len(codes), -1, 32)
    values = values * np.where(scales == 0, 0, 2.0 ** (scales.astype(np.int64) - 127))[..., None]
    values[np.abs(values) < 2.0**-126] *= 0
    values[np.abs(values) >= 2.0**128] *= np.inf
    return values.reshape(codes.shape)
