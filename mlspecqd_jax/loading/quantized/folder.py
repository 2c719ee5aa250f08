"""A folder of quantized weights: every tensor is used, or known not to matter, or refused; packed weights are read one by one.

Lists in configs of what was left as it is need no reading: the tensors tell.
"""

import dataclasses
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import cast

import jax
import numpy as np

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import printable
from mlspecqd_jax.loading import weight_files
from mlspecqd_jax.loading.quantized.module import PLAIN, Module, Packed, Reader, Stored
from mlspecqd_jax.loading.quantized.safetensors_map import map_file
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD, Source, Tensor

# Of a linear layer, what bears on its activations alone, or on a cache in few bits.
OF_ACTIVATIONS = r"(input|output|activation|k|v|q)_(scale|zero_point|global_scale|scale_ub|amax)"
# What else a layer may have that changes what it computes, by how its name begins.
REFUSED = {"pre_quant_scale": "smoothed activations", "svdquant": "a low-rank part", "lora": "a low-rank part"}


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a folder holds of a network: its tensors as they are, and its quantized linear layers."""

    path: pathlib.Path
    plain: dict[str, Stored]  # by the parameter's name
    modules: dict[str, Module]  # by the name of its weight

    def leaves(self, read: Reader) -> Iterator[tuple[str, np.ndarray | QuantizedArray]]:
        """Yield every parameter by name, in no memory of its own (plain) or as it is stored.

        Raises:
          InputError: a quantized layer is not what the config says.
        """
        for name, stored in self.plain.items():
            yield name, stored.array
        for name, module in self.modules.items():
            try:
                packed: Packed = read(module)
            except InputError as error:
                raise InputError(f"{self.path}: {printable(str(error))}") from error
            yield name, QuantizedArray(cast(dict[str, jax.Array], packed.arrays), module.shape, packed.format)


def open_folder(path: pathlib.Path, network: Network) -> Folder:
    """Account for every tensor of a folder by the network that it is to hold.

    Where config.json ties head and embedding, a quantized head is left out, as by transformers.

    Raises:
      InputError: a tensor is unknown, missing, or of another shape; or nothing is quantized.
    """
    expected, tied = network.untied.tensors(), network.config.tied
    other = next((source for name, tensor in expected.items() for source in tensor.sources if source != Source((name,))), None)
    if other is not None:
        raise InputError(
            f"{path}: quantized weights are read under Llama's names alone, and a file of this family holds {other.names[0]}; "
            "give the original checkpoint"
        )
    found, ignored, problems = _found(path, expected)
    plain: dict[str, Stored] = {}
    modules: dict[str, Module] = {}
    for name, tensor in expected.items():
        owner, _, kind = name.rpartition(".")
        beside = {of: stored for of, stored in found.get(owner, {}).items() if of != "bias"}
        module = Module(owner, cast(tuple[int, int], tensor.shape), beside)
        if kind == "weight" and tensor.linear and module.tensors and not module.is_plain:
            if name == HEAD and tied:
                ignored += [stored.name for stored in module.tensors.values()]
            else:
                modules[name] = module
        elif kind in found.get(owner, {}):
            plain[name] = found[owner][kind]
            problems += _misfit(plain[name], tensor.shape)
        elif not (tied and name in (HEAD, EMBEDDING)):
            problems.append(f"missing tensor {name}")
    if tied and not {HEAD, EMBEDDING} & plain.keys():
        problems.append(f"missing tensor {EMBEDDING}")
    for owner, kinds in found.items():  # some writers give every quantized layer a bias
        bias = kinds.get("bias")
        if bias and f"{owner}.bias" not in expected and (bias.dtype not in PLAIN or bias.array.any()):
            problems.append(f"unknown tensor {bias.name}")
    if not problems and not modules:
        problems.append("no weight is quantized, although a file says so")
    if problems:
        raise InputError(
            f"{path} does not hold the quantized model that its config.json describes: {weight_files.some(problems, '; ')}; "
            "download the weights and config.json again from one source"
        )
    if ignored:
        warnings.warn(f"{path}: left out what this model does not use: {weight_files.some(ignored, ', ')}", stacklevel=3)
    return Folder(path, plain, modules)


def _found(path: pathlib.Path, expected: dict[str, Tensor]):
    """Return (tensors by the name of what they belong to and by the rest of theirs, names left out, problems)."""
    linear = {name.removesuffix(".weight") for name, tensor in expected.items() if tensor.linear and name.endswith(".weight")}
    headers, index = weight_files.headers(path)
    arrays = {file: map_file(file) for file in dict.fromkeys(place.file for place in headers)}
    found: dict[str, dict[str, Stored]] = {}
    ignored, problems = [], []
    for place, header in headers.items():
        name = _own_name(place.name, expected)
        owner, _, kind = name.rpartition(".")
        known = name in expected or owner in linear
        ballast = name not in expected and any(re.fullmatch(pattern, place.name) for pattern in weight_files.BALLAST)
        if ballast or (index is not None and index.get(place.name) != place.file):
            ignored.append(place.name)
        elif not known:
            problems.append(f"unknown tensor {place.name}")
        elif re.fullmatch(OF_ACTIVATIONS, kind):
            continue  # of every layer where there are any, and weights do not depend on them
        elif any(kind.startswith(word) for word in REFUSED):
            what = next(REFUSED[word] for word in REFUSED if kind.startswith(word))
            problems.append(f"tensor {place.name} belongs to {what}, which is not read")
        elif place.name not in arrays[place.file]:
            problems.append(f"tensor {place.name} is stored as {header.dtype}, which is not read")
        elif kind in found.get(owner, {}):
            problems.append(f"both {found[owner][kind].name} and {place.name} are there")
        else:
            found.setdefault(owner, {})[kind] = Stored(place.name, header.dtype, arrays[place.file][place.name])
    return found, ignored, problems


def _own_name(name: str, expected: dict[str, Tensor]) -> str:
    """Return the name that the network has for a tensor, or would have for one that stands for a weight."""
    own = weight_files.own_name(name, expected)
    if own in expected:
        return own
    owner, _, kind = name.rpartition(".")
    return f"{weight_files.own_name(f'{owner}.weight', expected).removesuffix('.weight')}.{kind}"


def _misfit(stored: Stored, shape: tuple[int, ...]) -> list[str]:
    if stored.array.shape != shape:
        return [f"tensor {stored.name} has shape {list(stored.array.shape)}, but config.json asks for {list(shape)}"]
    if stored.dtype not in PLAIN:
        return [f"tensor {stored.name} is stored as {stored.dtype}, but must be one of {', '.join(PLAIN)}"]
    return []
