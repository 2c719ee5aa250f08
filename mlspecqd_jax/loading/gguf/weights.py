"""The weights of a GGUF file, by Hugging Face's names: checked against a network, then placed one by one, or packed as they are.

Notation: N rows, K columns.
"""

import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.gguf import blocks
from mlspecqd_jax.loading.gguf.architectures import architecture
from mlspecqd_jax.loading.gguf.names import gguf_name, offset, row_order
from mlspecqd_jax.loading.gguf.reader import GGUF, Entry, raw
from mlspecqd_jax.loading.gguf.rope import DIVISORS
from mlspecqd_jax.loading.huggingface import place_finite
from mlspecqd_jax.loading.weight_files import some
from mlspecqd_jax.network.config import Attention
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights import tensors
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD

OWN_DTYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}  # of what is not read as float32


class Stored(NamedTuple):
    """A tensor of Hugging Face's, as a file holds it."""

    entry: Entry
    order: np.ndarray | None  # which of the file's rows is each of its rows, int64 [N]
    offset: float  # in the file's values


def locate(file: GGUF, model: Network) -> dict[str, Stored]:
    """Return where each tensor of a network lies, by Hugging Face's name; every tensor of the file is one of them.

    Raises:
      InputError: tensors missing, unknown, or of another shape.
    """
    kind, mixer = architecture(file), model.config.layers[0].mixer
    assert isinstance(mixer, Attention), "of every architecture that is read"
    expected = tensors.stored_shapes(model.tensors())
    theirs = {name: gguf_name(name, kind) for name in expected}
    unknown = file.tensors.keys() - {*theirs.values(), DIVISORS}
    problems = [f"unknown tensor {name}" for name in file.tensors if name in unknown]
    problems += [f"missing tensor {name}" for name in theirs.values() if name not in file.tensors]
    for name, shape in expected.items():
        entry = file.tensors.get(theirs[name])
        if entry is not None and entry.shape != shape:
            problems.append(f"tensor {entry.name} has shape {list(entry.shape)}, but the file's keys ask for {list(shape)}")
    if problems:
        raise InputError(
            f"{file.path} does not hold the model that its keys describe: {some(problems, '; ')}; use the original checkpoint, or "
            "download the file again"
        )
    return {name: Stored(file.tensors[theirs[name]], row_order(name, kind, mixer), offset(name, kind)) for name in expected}


def values(stored: Stored, dtype: np.dtype) -> np.ndarray:
    """Return a tensor's values as Hugging Face has them, rounded to `dtype` once."""
    entry, exact = stored.entry, np.dtype(np.float32)
    shape = (math.prod(entry.shape[:-1]), entry.shape[-1])
    found = blocks.values(entry.block, raw(entry), np.empty(shape, exact if stored.offset else dtype)).reshape(entry.shape)
    if stored.offset:
        found = (found - np.float32(stored.offset)).astype(dtype)
    return found if stored.order is None else found[stored.order]


def packed(stored: Stored) -> tuple[str, dict[str, np.ndarray]] | None:
    """Return the format and the arrays by role that hold a weight [N, K] in its own codes, or None where the file holds floats."""
    found = blocks.packed(stored.entry.block, raw(stored.entry))
    if found is None or stored.order is None:
        return found
    format, arrays = found
    return format, {role: array if role == "tensor_scale" else array[stored.order] for role, array in arrays.items()}


def read_params(file: GGUF, model: Network, dtype: jnp.dtype, mesh: Mesh | None) -> dict[str, jax.Array]:
    """Stream every tensor of a file to its place, in `dtype`; a tied network has no head.

    Raises:
      InputError: tensors missing, unknown, of another shape, or not finite.
    """
    located, expected = locate(file, model), model.tensors()
    params = {}
    for name, tensor in tqdm(expected.items(), desc="Loading weights", unit="tensor", disable=None, leave=False):
        array = tensors.read(tensor, lambda stored: values(located[stored], np.dtype(dtype)))
        first = located[tensor.sources[0].names[0]].entry
        params[name] = place_finite(first.name, array, dtype, mesh, tensor, first.file)
    return params


def leaves(file: GGUF, model: Network) -> dict[str, np.ndarray | QuantizedArray]:
    """Return every parameter as it is stored: packed if it is a linear layer's weight or the embedding, else as floats.

    A tied network whose embedding is packed has that as its head.

    Raises:
      InputError: tensors missing, unknown, or of another shape, or a scale that is not finite.
    """
    located, found = locate(file, model), {}
    for name, tensor in tqdm(model.tensors().items(), desc="Loading weights", unit="tensor", disable=None, leave=False):
        stored = located[tensor.sources[0].names[0]]
        arrays = packed(stored) if tensor.linear or name == EMBEDDING else None
        if arrays is None:
            found[name] = tensors.read(tensor, lambda source: _floats(located[source]))
        else:
            found[name] = _leaf(stored.entry, *arrays)
    if model.config.tied and isinstance(found[EMBEDDING], QuantizedArray):
        found[HEAD] = found[EMBEDDING]
    return found


def _floats(stored: Stored) -> np.ndarray:
    exact = np.dtype(np.float32)
    return values(stored, exact if stored.offset else OWN_DTYPES.get(stored.entry.block.name, exact))


def _leaf(entry: Entry, format: str, arrays: dict[str, np.ndarray]) -> QuantizedArray:
    for role in {"scales", "minima"} & arrays.keys():
        whole = arrays[role] < 255 if arrays[role].dtype == np.uint8 else np.isfinite(arrays[role])  # of E8M0, 255 is NaN
        if not whole.all():
            raise InputError(f"{entry.file}: tensor {entry.name} holds NaN or infinity; use an intact file")
    return QuantizedArray(cast(dict[str, jax.Array], arrays), (entry.shape[0], entry.shape[1]), format)


def provenance(file: GGUF, dtype: jnp.dtype) -> str | None:
    """Say from which types a file's weights were dequantized, in one sentence, or None where it holds floats alone."""
    kinds = {block.name for block in blocks.BLOCKS.values() if block.format is not None}
    types = [f"{count} of {name}" for name, count in file.types.items() if name in kinds]
    if not types:
        return None
    rest = sum(count for name, count in file.types.items() if name not in kinds)
    rounded = "" if dtype == jnp.float32 else f"; the rounding to {jnp.dtype(dtype).name} is ours, not the file's"
    return f"{file.path}: weights are dequantized ({', '.join(types)} and {rest} of floats){rounded}"
