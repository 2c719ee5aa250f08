"""By which method a folder's weights are quantized, from its small files, and what reads them; all others are refused by name."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import read_json_if_there
from mlspecqd_jax.loading.native_mxfp4 import is_native
from mlspecqd_jax.loading.quantized.auto_round import auto_round
from mlspecqd_jax.loading.quantized.awq import awq
from mlspecqd_jax.loading.quantized.compressed_tensors import compressed_tensors
from mlspecqd_jax.loading.quantized.fp8 import fp8
from mlspecqd_jax.loading.quantized.gptq import gptq
from mlspecqd_jax.loading.quantized.modelopt import modelopt
from mlspecqd_jax.loading.quantized.module import Reader
from mlspecqd_jax.loading.quantized.quark import quark

METHODS: dict[str, Callable[[dict], Reader]] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "auto-round": auto_round,
    "fp8": fp8,
    "modelopt": modelopt,
    "quark": quark,
}
# Beside a config.json that says nothing: GPTQ's and ModelOpt's files of their own.
GPTQ_FILE, MODELOPT_FILE = "quantize_config.json", "hf_quant_config.json"


class Quantization(NamedTuple):
    """What a folder says of how its weights were quantized."""

    method: str
    config: dict
    file: pathlib.Path  # that says it


def find_quantization(folder: pathlib.Path) -> Quantization | None:
    """Return what a folder says of its weights' quantization, or None where it says nothing, or what `native_mxfp4` reads.

    Raises:
      InputError: a file is damaged, or names no method.
    """
    path = folder / "config.json"
    said = quantization_of(path, read_json_if_there(path))
    if said is not None:
        return said
    of_modelopt = read_json_if_there(folder / MODELOPT_FILE).get("quantization")
    if of_modelopt:
        found = {"quant_method": "modelopt"} | of_modelopt if isinstance(of_modelopt, dict) else of_modelopt
        return _quantization(folder / MODELOPT_FILE, found)
    of_gptq = read_json_if_there(folder / GPTQ_FILE)
    return _quantization(folder / GPTQ_FILE, {"quant_method": "gptq"} | of_gptq) if of_gptq else None


def quantization_of(path: pathlib.Path, raw: dict) -> Quantization | None:
    """Return what the contents of a config.json say; messages name `path`.

    Raises:
      InputError: as `find_quantization`.
    """
    if is_native(raw):
        return None
    text = raw.get("text_config")  # of a multimodal model
    places = (raw, text) if isinstance(text, dict) else (raw,)
    found = next((at[key] for at in places for key in ("quantization_config", "compression_config") if at.get(key)), None)
    return None if found is None else _quantization(path, found)


def _quantization(path: pathlib.Path, found: Any) -> Quantization:
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str):
        raise InputError(
            f"{path}: the weights are quantized already, but not said how: {brief(found)} has no quant_method; give the original "
            "BF16, FP16 or FP32 checkpoint"
        )
    return Quantization(method, found, path)


def reader_of(quantization: Quantization) -> Reader:
    """Return what reads the modules of a folder.

    Raises:
      InputError: a method, or a variant of one, that is not read.
    """
    make = METHODS.get(quantization.method)
    if make is None:
        raise InputError(
            f"{quantization.file}: weights quantized by {brief(quantization.method)} are not read; these are: {', '.join(METHODS)}"
        )
    try:
        return make(quantization.config)
    except InputError as error:
        raise InputError(f"{quantization.file}: {quantization.method}: {error}") from error
