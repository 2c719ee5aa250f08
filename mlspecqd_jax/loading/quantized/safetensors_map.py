"""Safetensors files mapped as numpy arrays, the 8-bit floats among their tensors as the bytes that they are.

Format: https://github.com/huggingface/safetensors (eight bytes of the header's length, JSON, values). Its own package hands numpy
no float of eight bits. Headers are read after `weight_files.headers`, which checked them.
"""

import json
import math
import pathlib

import ml_dtypes
import numpy as np

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import reason

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}


def map_file(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Return a file's tensors by name, of the types in `DTYPES`; pages are read when they are first used.

    Raises:
      InputError: the file cannot be mapped.
    """
    try:
        data = np.memmap(file, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        known = {name: entry for name, entry in header.items() if entry.get("dtype") in DTYPES}
        return {name: _tensor(data[start:], **entry) for name, entry in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is truncated or not a safetensors file ({reason(error)}); download it again") from error


def _tensor(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    begin = data_offsets[0]
    return data[begin : begin + math.prod(shape) * DTYPES[dtype].itemsize].view(DTYPES[dtype]).reshape(shape)
