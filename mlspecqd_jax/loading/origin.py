"""`Origin`: what a model's small files, or the keys of its GGUF file, say of it, and how its parameters are read from there."""

import functools
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlspecqd_jax.json_files import read_json, read_json_if_there
from mlspecqd_jax.loading import checkpoint, config_file, huggingface
from mlspecqd_jax.loading.gguf import architectures, reader, small_files, tokenizer, weights
from mlspecqd_jax.loading.quantized.method import Quantization, find_quantization
from mlspecqd_jax.loading.quantized.params import Leaves, decoded, leaves_of
from mlspecqd_jax.network.config import Config
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.text import tokenizer_files
from mlspecqd_jax.weights.quantized_array import Leaf


class Origin(NamedTuple):
    """A model before its parameters and its tokenizer are read."""

    kind: str  # in words
    family: str  # config.json's model_type
    config: Config
    eos_token_ids: tuple[int, ...]
    recorded: Mapping[str, Any]  # generation_config.json
    tokenizer_kind: str
    facts: Mapping[str, str]  # more to say of it, by name
    quantization: Quantization | None  # of weights that are quantized already
    leaves: Callable[[Network], Leaves] | None  # those weights as they are stored
    tokenizer: Callable[[Any], Any]  # or None where there is none; the given one where it is known to have the same tokens
    params: Callable[[Network, jnp.dtype, Mesh | None], Mapping[str, Leaf]]  # decoded where somebody quantized them


def origin(place: pathlib.Path) -> Origin:
    """Return what a folder or a GGUF file says of its model.

    Raises:
      InputError: its config, or its keys, cannot be read.
    """
    return _of_file(reader.read(place)) if place.is_file() else _of_folder(place)


def _of_folder(folder: pathlib.Path) -> Origin:
    config, quantization, converted = config_file.read_config(folder), find_quantization(folder), checkpoint.is_converted(folder)
    raw, leaves = read_json(folder / "config.json"), None
    params = functools.partial(checkpoint.restore if converted else huggingface.read_params, folder)
    if quantization is not None:
        leaves = functools.partial(leaves_of, folder, quantization)
        params = functools.partial(_decoded, folder, quantization)
    return Origin(
        kind=f"{'converted' if converted else 'Hugging Face'} checkpoint in {folder}",
        family=raw["model_type"],
        config=config,
        eos_token_ids=config_file.eos_token_ids(folder, config.vocab_size),
        recorded=read_json_if_there(folder / "generation_config.json"),
        tokenizer_kind=tokenizer_files.describe(folder),
        facts={},
        quantization=quantization,
        leaves=leaves,
        tokenizer=lambda known: tokenizer_files.read_tokenizer(folder),
        params=params,
    )


def _of_file(file: reader.GGUF) -> Origin:
    described = architectures.config_json(file)
    recorded = small_files.generation_config(file)
    config = config_file.config_of(file.path, described)
    weights.locate(file, Network(config))  # so that what is said of it is what would be loaded
    types = ", ".join(f"{count} {name}" for name, count in file.types.items())
    return Origin(
        kind=f"GGUF file {file.path}" + (f" and {file.parts - 1} more" if file.parts > 1 else ""),
        family=described["model_type"],
        config=config,
        eos_token_ids=tuple(recorded["eos_token_id"]),
        recorded=recorded,
        tokenizer_kind=tokenizer.describe(file),
        facts={"tensors": types},
        quantization=Quantization("GGUF", {}, file.path) if file.is_quantized else None,
        leaves=functools.partial(weights.leaves, file) if file.is_quantized else None,
        tokenizer=functools.partial(tokenizer.read_tokenizer, file),
        params=functools.partial(_dequantized, file),
    )


def _decoded(
    folder: pathlib.Path, quantization: Quantization, model: Network, dtype: jnp.dtype, mesh: Mesh | None
) -> dict[str, jax.Array]:
    return decoded(folder, leaves_of(folder, quantization, model), model, dtype)


def _dequantized(file: reader.GGUF, model: Network, dtype: jnp.dtype, mesh: Mesh | None) -> dict[str, jax.Array]:
    said = weights.provenance(file, dtype)
    if said is not None:
        warnings.warn(said, stacklevel=4)
    return weights.read_params(file, model, dtype, mesh)
