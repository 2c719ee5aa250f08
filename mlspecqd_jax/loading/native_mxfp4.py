"""GPT-OSS as it is published: the experts' weights in MXFP4, which is how the target multiplies them; nothing is decoded or cast.

In place of a tensor of all experts' weights the file has two of bytes: NAME_blocks [E, N, K/32, 16], element 2i of a block in the
low half of byte i, and NAME_scales [E, N, K/32] in E8M0. A reshape makes contract C2 of them. Source: transformers,
integrations/mxfp4.py.

Notation: E experts, N outputs of each, K contracted.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import read_json_if_there
from mlspecqd_jax.weights import tensors
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from mlspecqd_jax.weights.tensors import Tensor
from pallas_kernels import BLOCK

FORMAT, FAMILY = "mxfp4", "gpt_oss"
NOT_A_NUMBER = 255  # of E8M0


def is_native(raw: Mapping[str, Any]) -> bool:
    """Return whether the contents of a config.json say that experts' weights are stored so."""
    said = raw.get("quantization_config")
    return raw.get("model_type") == FAMILY and isinstance(said, dict) and said.get("quant_method") == FORMAT


def in_parts(folder: pathlib.Path, expected: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return, of the parameters that a folder holds in MXFP4, what their codes [E * N, K/32, 16] and scales [E * N, K/32] are.

    Raises:
      InputError: K is no multiple of 32.
    """
    if not is_native(read_json_if_there(folder / "config.json")):
        return {}
    packed = {name: tensor for name, tensor in expected.items() if tensor.linear and tensor.experts}
    for name, tensor in packed.items():
        if tensor.shape[1] % BLOCK:
            raise InputError(
                f"{folder}: {name} has {tensor.shape[1]} elements a row, but MXFP4 needs a multiple of {BLOCK}; correct config.json"
            )
    return {name: {"codes": _part(tensor, "blocks", 16), "scales": _part(tensor, "scales")} for name, tensor in packed.items()}


def _part(tensor, kind, *rest):
    source = tensor.sources[0]
    source = source._replace(names=tuple(f"{name}_{kind}" for name in source.names), transpose=False)
    return Tensor((tensor.shape[0], tensor.shape[1] // BLOCK, *rest), (), False, (source,))


def read(folder: pathlib.Path, name: str, parts: Mapping[str, Tensor], get: Callable[[str], np.ndarray]) -> QuantizedArray:
    """Return a parameter as it is stored; `get` returns a tensor of the file by name.

    Raises:
      InputError: a scale is no number.
    """
    codes, scales = (np.ascontiguousarray(tensors.read(parts[role], get)) for role in ("codes", "scales"))
    if (scales == NOT_A_NUMBER).any():
        raise InputError(f"{folder}: tensor {name} has scales that are no numbers; use an intact checkpoint")
    rows = len(scales)
    arrays: Any = {"codes": codes.reshape(rows, -1), "scales": scales}
    return QuantizedArray(arrays, (rows, scales.shape[1] * BLOCK), FORMAT)
