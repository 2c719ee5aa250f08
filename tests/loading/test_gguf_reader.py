"""The header of a GGUF file: keys, tensors, files that are split, and one sentence for whatever is wrong with them."""

import struct

import gguf_files
import numpy as np
import pytest
from gguf_files import floats, write
from refusals import refused

from mlspecqd_jax.loading.gguf import reader

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.array([1, -2.5], np.float32)
TENSORS = {"a": floats(A), "b": floats(B, "BF16")}


def contents(entry):
    raw = reader.raw(entry)
    return np.array(raw).reshape(-1).view(gguf_files.DTYPES[entry.block.name]).reshape(entry.shape)


@pytest.mark.parametrize("version", [2, 3])
def test_keys_and_tensors(tmp_path, version):
    keys = {"one": 1, "minus": -3, "yes": True, "eps": 1e-5, "name": "né", "words": ["a", "", "b c"], "none": [], "numbers": [1, 2]}
    keys |= {
        "byte": (0, b"\xff"),
        "short": (3, b"\xfe\xff"),
        "long": (10, bytes(7) + b"\1"),
        "double": (12, struct.pack("<d", 0.1)),
    }
    file = reader.read(write(tmp_path / "x.gguf", keys, TENSORS, version=version))
    read = {"byte": 255, "short": -2, "long": 2**56, "double": 0.1}
    assert dict(file.keys) == keys | read
    assert {name: entry.shape for name, entry in file.tensors.items()} == {"a": (3, 4), "b": (2,)}
    assert file.types == {"F32": 1, "BF16": 1}
    assert file.parts == 1
    np.testing.assert_array_equal(contents(file.tensors["a"]), A)
    np.testing.assert_array_equal(contents(file.tensors["b"]).astype(np.float32), B)


def test_another_alignment(tmp_path):
    file = reader.read(write(tmp_path / "x.gguf", {"general.alignment": 64}, TENSORS, alignment=64))
    assert all(entry.offset % 64 == 0 for entry in file.tensors.values())
    np.testing.assert_array_equal(contents(file.tensors["a"]), A)


def split(tmp_path, **changes):
    """Write a model in two parts; `changes` replace keys of the second."""
    count = (2, struct.pack("<H", 2))
    keys = {"split.no": (2, b"\0\0"), "split.count": count, "split.tensors.count": (5, struct.pack("<i", 2)), "name": "x"}
    first = write(tmp_path / "x-00001-of-00002.gguf", keys, {"a": TENSORS["a"]})
    more = {"split.no": (2, b"\1\0"), "split.count": count, "split.tensors.count": (5, struct.pack("<i", 2))}
    second = write(tmp_path / "x-00002-of-00002.gguf", more | changes, {"b": TENSORS["b"]})
    return first, second


def test_a_split_model_is_read_together_by_any_of_its_files(tmp_path):
    for path in split(tmp_path):
        file = reader.read(path)
        assert (file.parts, file.keys["name"], file.path.name) == (2, "x", "x-00001-of-00002.gguf")
        np.testing.assert_array_equal(contents(file.tensors["a"]), A)
        np.testing.assert_array_equal(contents(file.tensors["b"]).astype(np.float32), B)


def test_parts_that_do_not_belong_together(tmp_path):
    first, second = split(tmp_path, **{"split.no": (2, b"\2\0")})
    with refused(second.name, "part 2"):
        reader.read(first)
    write(second, {"split.no": (2, b"\1\0"), "split.count": (2, b"\2\0")}, {"a": TENSORS["a"]})
    with refused(second.name, "'a'", "another part"):
        reader.read(first)
    write(second, {"split.no": (2, b"\1\0"), "split.count": (2, b"\2\0")}, {})
    with refused("hold 2 tensors", "hold 1"):
        reader.read(first)
    second.unlink()
    with refused(second.name, "is missing"):
        reader.read(first)
    with refused("split over 2 files", "says 1"):
        reader.read(first.rename(tmp_path / "y.gguf"))
    with refused("split over 1 files", "says 3"):
        reader.read(write(tmp_path / "z-00001-of-00003.gguf", {}, TENSORS))


@pytest.mark.parametrize(
    ("version", "words"),
    [(1, ["version 1", "2 and 3"]), (4, ["version 4"]), (0x03000000, ["big-endian"])],
)
def test_another_version(tmp_path, version, words):
    with refused("x.gguf", *words):
        reader.read(write(tmp_path / "x.gguf", {}, {}, version=version))


@pytest.mark.parametrize(("kind", "name"), [("IQ4_XS", "IQ4_XS"), ("Q2_K", "Q2_K"), ("NVFP4", "NVFP4"), (99, "type 99")])
def test_a_type_that_is_not_read_is_named(tmp_path, kind, name):
    with refused("'t'", name, "Q4_K"):
        reader.read(write(tmp_path / "x.gguf", {}, {"t": (kind, np.zeros(256, np.uint8), (1, 256))}))


def test_what_is_no_gguf_file(tmp_path):
    path = tmp_path / "x.gguf"
    for content, words in [(b"", ["no GGUF"]), (b"GGML" + bytes(60), ["no GGUF"]), (b"GGUF\3\0", ["truncated"])]:
        path.write_bytes(content)
        with refused("x.gguf", *words):
            reader.read(path)
    with refused("is missing"):
        reader.read(tmp_path / "y.gguf")


def test_every_shorter_file_is_refused(tmp_path):
    whole = write(tmp_path / "x.gguf", {"general.name": "né", "numbers": [1, 2], "words": ["a", "b"]}, TENSORS).read_bytes()
    last = whole.rstrip(b"\0")  # beyond the last tensor lies only padding
    for size in range(len(last) - 2):
        (tmp_path / "y.gguf").write_bytes(whole[:size])
        with refused("y.gguf", "no GGUF" if size < 4 else "is truncated"):
            reader.read(tmp_path / "y.gguf")


HUGE = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("keys", "tensors", "words"),
    [
        ({"k": (8, HUGE)}, {}, ["truncated"]),
        ({"k": (9, struct.pack("<I", 8) + HUGE)}, {}, ["truncated"]),
        ({"k": (9, struct.pack("<I", 4) + HUGE)}, {}, ["truncated"]),
        ({"k": (9, struct.pack("<I", 9) + HUGE)}, {}, ["'k'", "type 9"]),
        ({"k": (13, b"")}, {}, ["'k'", "type 13"]),
        ({"k": (8, struct.pack("<Q", 2) + b"\xff\xff")}, {}, ["damaged"]),
        ({"general.alignment": 7}, TENSORS, ["general.alignment", "7"]),
        ({"general.alignment": "x"}, TENSORS, ["general.alignment"]),
        ({}, {"t": ("F32", np.zeros(4, np.uint8), (1, 1, 1, 1, 1))}, ["5 dimensions"]),
        ({}, {"t": ("F32", np.zeros(4, np.uint8), ())}, ["0 dimensions"]),
        ({}, {"t": ("F32", np.zeros(4, np.uint8), (0, 4))}, ["shape [0, 4]"]),
        ({}, {"t": ("Q4_0", np.zeros(18, np.uint8), (1, 33))}, ["shape [1, 33]", "Q4_0"]),
        ({}, {"t": ("F32", np.zeros(4, np.uint8), (2**60, 2**60))}, ["truncated", "'t'"]),
    ],
)
def test_a_damaged_header(tmp_path, keys, tensors, words):
    with refused("x.gguf", *words):
        reader.read(write(tmp_path / "x.gguf", keys, tensors))


def test_what_stands_twice(tmp_path):
    data = write(tmp_path / "x.gguf", {"k1": 1, "k2": 2}, {"t1": TENSORS["a"], "t2": TENSORS["b"]}).read_bytes()
    for old, new in ((b"k2", b"k1"), (b"t2", b"t1")):
        (tmp_path / "y.gguf").write_bytes(data.replace(old, new))
        with refused("y.gguf", new.decode(), "twice"):
            reader.read(tmp_path / "y.gguf")


def test_names_are_printable(tmp_path):
    assert list(reader.read(write(tmp_path / "x.gguf", {}, {"a\x1b[31m\n": TENSORS["a"]})).tensors) == ["a?[31m"]
