"""Quantized linear layers as each method writes them, by hand, and what they stand for, from the formulas alone.

A layer begins as codes q [N, K], zeros z [N, G] and scales s [N, G], and is (q - z) * s. Small floats begin as codes too. Nothing
here is the package's own.
"""

import json
import pathlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int8": "I8"}
NAMES |= {"uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the fields of a word


class Grouped(NamedTuple):
    """Integers in groups along K."""

    q: np.ndarray  # [N, K], from 0
    z: np.ndarray  # [N, G]
    s: np.ndarray  # [N, G]
    bits: int
    group: int
    of: np.ndarray  # [K], the group of each input

    @property
    def weight(self) -> np.ndarray:
        return (self.q - self.z[:, self.of].astype(float)) * self.s.astype(float)[:, self.of]


def rounded(w: np.ndarray, bits: int, group: int, symmetric: bool, of=None, dtype=np.float16) -> Grouped:
    """Round a weight to the nearest codes; `of` deals the inputs into groups in another order."""
    k = w.shape[1]
    of = np.arange(k) // group if of is None else of
    parts = [w[:, of == g] for g in range(of.max() + 1)]
    low = np.stack([part.min(axis=1) for part in parts], axis=1).clip(max=0)
    high = np.stack([part.max(axis=1) for part in parts], axis=1).clip(min=0)
    top, half = 2**bits - 1, 2 ** (bits - 1)
    s = (np.maximum(-low, high) / (half - 0.5) if symmetric else (high - low) / top).astype(dtype)
    z = np.full(s.shape, half) if symmetric else np.rint(-low / s.astype(float)).astype(int)
    q = np.rint(w / s.astype(float)[:, of] + z[:, of]).clip(0, top).astype(int)
    return Grouped(q, z, s, bits, group, of)


def words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields [R, C] to int32 [R, C * bits / 32], the least significant first."""
    each = 32 // bits
    fields = np.pad(fields, ((0, 0), (0, -fields.shape[1] % each)))
    joined = sum(fields[:, j::each].astype(np.uint32) << np.uint32(bits * j) for j in range(each))
    return np.ascontiguousarray(joined, np.uint32).view(np.int32)


def gptq(a: Grouped, version: int = 1) -> dict:
    zeros = words(a.z.T, a.bits)
    if version == 1:
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, a.bits)))
        zeros = (zeros.view(np.uint32) - ones).view(np.int32)
    return {"qweight": words(a.q, a.bits).T, "qzeros": zeros, "scales": a.s.T, "g_idx": a.of.astype(np.int32)}


def awq_words(fields: np.ndarray) -> np.ndarray:
    pieces = fields.reshape(len(fields), -1, 8)[:, :, AWQ_COLUMNS]
    return words(pieces.reshape(fields.shape), 4)


def awq(a: Grouped) -> dict:
    return {"qweight": awq_words(a.q.T), "qzeros": awq_words(a.z.T), "scales": a.s.T}


def pack_quantized(a: Grouped, zeros: bool = False) -> dict:
    shape = np.array(a.q.shape, np.int64)
    found = {"weight_packed": words(a.q, a.bits), "weight_scale": a.s, "weight_shape": shape}
    return found | ({"weight_zero_point": words(a.z.T, a.bits).T} if zeros else {})


def int_quantized(a: Grouped, zeros: bool = False) -> dict:
    found = {"weight": (a.q - 128).astype(np.int8), "weight_scale": a.s}
    return found | ({"weight_zero_point": (a.z - 128).astype(np.int8)} if zeros else {})


def quark_int4(a: Grouped, signed: bool) -> dict:
    q, z = ((a.q - 8) & 15, (a.z - 8) & 15) if signed else (a.q, a.z)
    return {"weight": awq_words(q.T), "weight_scale": a.s.T, "weight_zero_point": awq_words(z.T)}


def nibbles(codes: np.ndarray) -> np.ndarray:
    return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)


class Floats(NamedTuple):
    """Small floats: codes, the stored scales, and what they stand for."""

    codes: np.ndarray
    scales: np.ndarray
    weight: np.ndarray  # without a scale of the tensor


def nearest(w: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the codes of the nearest values of a table."""
    usable = np.flatnonzero(~np.isnan(table))
    order = usable[np.argsort(table[usable], kind="stable")]
    middle = (table[order][1:] + table[order][:-1]) / 2
    return order[np.searchsorted(middle, w)]


def as_e4m3(codes: np.ndarray) -> np.ndarray:
    return codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)


def mx(w: np.ndarray) -> Floats:
    n = len(w)
    largest = np.abs(w.reshape(n, -1, 32)).max(axis=2)
    exponents = np.floor(np.log2(np.maximum(largest, 1e-30))).astype(int) - 2
    spread = np.repeat(2.0**exponents, 32, axis=1)
    codes = nearest(w / spread, E2M1)
    return Floats(codes, (exponents + 127).astype(np.uint8), E2M1[codes] * spread)


def nv(w: np.ndarray, factor: float) -> Floats:
    n = len(w)
    scales = nearest(np.abs(w.reshape(n, -1, 16)).max(axis=2) / 6 / factor, E4M3)
    spread = np.repeat(E4M3[scales], 16, axis=1) * factor
    codes = nearest(w / spread, E2M1)
    return Floats(codes, as_e4m3(scales), E2M1[codes] * spread)


def e4m3(w: np.ndarray, kind: str) -> Floats:
    """By one scale for the `tensor`, one a `row`, or one a `tile` of 128 x 128."""
    n, k = w.shape
    high, wide = {"tensor": (n, k), "row": (1, k), "tile": (128, 128)}[kind]
    tiles = [[w[i : i + high, j : j + wide] for j in range(0, k, wide)] for i in range(0, n, high)]
    scales = np.array([[np.abs(tile).max() / 448 for tile in row] for row in tiles], np.float32)
    spread = np.repeat(np.repeat(scales, high, 0)[:n], wide, 1)[:, :k].astype(float)
    codes = nearest((w / spread).clip(-448, 448), E4M3)
    return Floats(as_e4m3(codes), scales.reshape(()) if kind == "tensor" else scales, E4M3[codes] * spread)


def write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file, which its own package does not of 8-bit floats in numpy."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def decode(format: str, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """What a stored weight stands for, element by element, in float64."""
    n, k = shape
    name, _, rest = format.partition("_g")
    bits = 4 if name in ("int4", "uint4", "mxfp4", "nvfp4") else 8
    group = int(rest) if rest else {"int4": 32, "mxfp4": 32, "nvfp4": 16, "fp8_e4m3_128x128": 128}.get(name, k)
    rows = 128 if name == "fp8_e4m3_128x128" else 1
    values = {"int4": np.arange(16.0) - 8, "int8": np.arange(256.0) - 128, "uint4": np.arange(16.0), "uint8": np.arange(256.0)}
    table = values.get(name, E2M1 if bits == 4 else E4M3)
    scales = arrays["scales"]
    if name == "mxfp4":
        scales = 2.0 ** (scales.astype(int) - 127)
    elif name == "nvfp4":
        scales = E4M3[scales]
    out = np.zeros(shape)
    column = np.arange(k)
    for row in range(n):
        codes = arrays["codes"][row]
        codes = np.stack([codes % 16, codes // 16], axis=1).reshape(-1) if bits == 4 else codes
        assert not codes[k:].any()
        value = table[codes[:k]] * scales[row // rows].astype(float)[column // group]
        if "minima" in arrays:
            value = value + arrays["minima"][row].astype(float)[column // group]
        out[row, arrays.get("order", column)] = value * float(arrays.get("row_scale", np.ones(n))[row])
    return out * float(arrays.get("tensor_scale", np.ones(1))[0])
