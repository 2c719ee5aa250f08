"""Blocks of a GGUF file: every type from random bytes, against a decoder that follows the formulas one element at a time."""

import struct

import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import TYPES

from mlspecqd_jax.loading.gguf import blocks
from mlspecqd_jax.weights.cast import dequantize
from mlspecqd_jax.weights.formats import SCALE_DTYPES, format_of
from mlspecqd_jax.weights.quantized_array import QuantizedArray

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
NAMED = {block.name: block for block in blocks.BLOCKS.values()}
QUANTIZED = [name for name, block in NAMED.items() if block.format is not None]


def half(data, at=0) -> np.float32:
    return np.float32(struct.unpack_from("<e", data, at)[0])


def nibble(data, i) -> int:
    """Element i of 16 bytes whose low halves come first."""
    return data[i % 16] >> 4 * (i // 16) & 15


def six_bits(data, j) -> tuple[int, int]:
    """Scale and minimum of sub-block j, from 12 bytes."""
    if j < 4:
        return data[j] & 63, data[j + 4] & 63
    return data[j + 4] & 15 | data[j - 4] >> 6 << 4, data[j + 4] >> 4 | data[j] >> 6 << 4


def element(kind: str, b: bytes, i: int) -> np.float32:
    """Return value i of one block."""
    f = np.float32
    match kind:
        case "F32":
            return f(struct.unpack("<f", b)[0])
        case "F16":
            return half(b)
        case "BF16":
            return f(struct.unpack("<f", b"\0\0" + b)[0])
        case "Q4_0":
            return f(nibble(b[2:], i) - 8) * half(b)
        case "Q4_1":
            return f(nibble(b[4:], i)) * half(b) + half(b, 2)
        case "Q5_0":
            fifth = struct.unpack_from("<I", b, 2)[0] >> i & 1
            return f((nibble(b[6:], i) | fifth << 4) - 16) * half(b)
        case "Q5_1":
            fifth = struct.unpack_from("<I", b, 4)[0] >> i & 1
            return f(nibble(b[8:], i) | fifth << 4) * half(b) + half(b, 2)
        case "Q8_0":
            return f(struct.unpack_from("<b", b, 2 + i)[0]) * half(b)
        case "Q4_K" | "Q5_K":
            j, at = i // 32, 16 if kind == "Q4_K" else 48
            scale, minimum = six_bits(b[4:16], j)
            code = b[at + 32 * (j // 2) + i % 32] >> 4 * (j % 2) & 15
            code |= (b[16 + i % 32] >> j & 1) << 4 if kind == "Q5_K" else 0
            return half(b) * f(scale) * f(code) - half(b, 2) * f(minimum)
        case "Q6_K":
            h, quarter, k = i // 128, i % 128 // 32, i % 32
            low = b[64 * h + 32 * (quarter % 2) + k] >> 4 * (quarter // 2) & 15
            high = b[128 + 32 * h + k] >> 2 * quarter & 3
            return half(b, 208) * f(struct.unpack_from("<b", b, 192 + i // 16)[0]) * f((low | high << 4) - 32)
        case "MXFP4":
            code = nibble(b[1:], i)
            return f((-1 if code & 8 else 1) * E2M1[code & 7]) * f(2.0 ** (b[0] - 127))
    raise AssertionError(kind)


def random_blocks(kind: str, rows=5, columns=3, seed=0) -> np.ndarray:
    """Return uint8 [rows, blocks, bytes] of which no value is infinite or none, as their halves are not."""
    block = NAMED[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns * 32 // min(block.elements, 32), block.nbytes), np.uint8)
    for at in {"Q6_K": (209,), "Q4_0": (1,), "Q5_0": (1,), "Q8_0": (1,), "F16": (1,), "BF16": (1,), "MXFP4": ()}.get(kind, (1, 3)):
        raw[..., at] &= 0xBF  # the highest bit of an exponent
    if kind == "MXFP4":
        raw[..., 0] = np.clip(raw[..., 0], 5, 250)  # else values that XLA may flush
    return raw


def slow(kind: str, raw: np.ndarray) -> np.ndarray:
    elements = NAMED[kind].elements
    rows = [[element(kind, b.tobytes(), i) for b in row for i in range(elements)] for row in raw]
    return np.array(rows, np.float32)


def test_the_ids_are_those_of_the_format():
    assert {block.name: i for i, block in blocks.BLOCKS.items()} == {name: TYPES[name] for name in NAMED}
    assert not set(blocks.BLOCKS) & set(blocks.TYPE_NAMES)


@pytest.mark.parametrize("kind", NAMED)
def test_values_are_the_formulas(kind, monkeypatch):
    raw = random_blocks(kind)
    monkeypatch.setattr(blocks, "AT_ONCE", 2 * raw.shape[1] * NAMED[kind].elements)  # two rows, two, and one
    found = blocks.values(NAMED[kind], raw, np.empty((5, raw.shape[1] * NAMED[kind].elements), np.float32))
    expected = slow(kind, raw)
    assert len(np.unique(expected)) > 50
    np.testing.assert_array_equal(found, expected)
    rounded = blocks.values(NAMED[kind], raw, np.empty(found.shape, jnp.bfloat16))
    np.testing.assert_array_equal(rounded, expected.astype(jnp.bfloat16))


def unpacked(name: str, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Decode a packed weight as a draft's is."""
    leaf = QuantizedArray({role: jnp.asarray(array) for role, array in arrays.items()}, shape, name)
    return np.asarray(dequantize(leaf, jnp.float32))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_packed_arrays_hold_the_same_weight(kind):
    raw = random_blocks(kind, seed=1)
    name, arrays = blocks.packed(NAMED[kind], raw)
    format, n, k = format_of(name), 5, raw.shape[1] * NAMED[kind].elements
    assert (arrays["codes"].dtype, arrays["codes"].shape) == (np.uint8, (n, format.code_bytes(k)))
    assert (arrays["scales"].dtype, arrays["scales"].shape) == (SCALE_DTYPES[format.scale], (n, k // format.group))
    assert ("minima" in arrays) == format.minimum
    expected, found = slow(kind, raw), unpacked(name, arrays, (n, k))
    if kind.endswith("_K"):
        each = np.abs(expected).reshape(n, -1, format.group).max(-1, keepdims=True).repeat(format.group, -1).reshape(n, k)
        assert np.all(np.abs(found - expected) <= 2e-3 * each + np.abs(expected).max() * 2.0**-22)
    else:
        assert "tensor_scale" not in arrays
        np.testing.assert_array_equal(found, expected)


def test_scales_beyond_float16_are_shifted_by_a_power_of_two():
    raw = np.zeros((1, 1, 144), np.uint8)
    raw[0, 0, :2] = np.frombuffer(np.float16(60000).tobytes(), np.uint8)
    raw[0, 0, 4:8], raw[0, 0, 16:] = 63, 0xFF
    _, arrays = blocks.packed(NAMED["Q4_K"], raw)
    assert np.log2(arrays["tensor_scale"][0]).is_integer()
    assert np.isfinite(arrays["scales"]).all()
    found = unpacked("uint4_g32", arrays, (1, 256))
    np.testing.assert_allclose(found[0, :32], float(np.float16(60000)) * 63 * 15, rtol=1e-3)
    np.testing.assert_array_equal(found[0, 128:], 0)


def test_floats_are_not_packed():
    assert all(blocks.packed(NAMED[kind], random_blocks(kind)) is None for kind in ("F32", "F16", "BF16"))


def test_a_scale_that_is_no_number_gives_none():
    raw = random_blocks("MXFP4")
    raw[0, 0, 0] = 255
    assert np.isnan(blocks.values(NAMED["MXFP4"], raw, np.empty((5, 96), np.float32))[0, :32]).any()


@pytest.mark.parametrize("kind", NAMED)
def test_blocks_as_their_own_package_decodes_them(kind):
    gguf = pytest.importorskip("gguf")
    raw = random_blocks(kind, rows=9, columns=8, seed=2)
    theirs = gguf.quants.dequantize(raw.reshape(len(raw), -1), gguf.GGMLQuantizationType(TYPES[kind]))
    found = blocks.values(NAMED[kind], raw, np.empty((9, raw.shape[1] * NAMED[kind].elements), np.float32))
    np.testing.assert_array_equal(found, theirs.reshape(found.shape))
