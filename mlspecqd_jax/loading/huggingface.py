"""Hugging Face checkpoints in: from the hub to a folder, and from its safetensors files to placed parameters.

A network's module paths are Hugging Face's tensor names, and its `tensors()` say from which rows of which of the file's tensors
each parameter comes. Headers are checked in full before a tensor is read (`weight_files`); parameters then stream one at a time
from the mapped file to their place, so that the process never holds a second model.
"""

import contextlib
import functools
import pathlib
import warnings
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import reason
from mlspecqd_jax.loading import native_mxfp4, stacked_experts, weight_files
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights import tensors
from mlspecqd_jax.weights.placement import place, weight_sharding
from mlspecqd_jax.weights.quantization import place_quantized
from mlspecqd_jax.weights.quantized_array import Leaf
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD, Tensor

HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "hf_quant_config.json",  # of weights that are quantized already, these two
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",  # these two only to say that tokenizer.json is what is read
    "vocab.json",
)
PART = 2**17  # elements that are looked at together, fewer than a core's cache holds


def download(repo_id: str, files: Sequence[str] = HUB_FILES) -> pathlib.Path:
    """Fetch the files that a load needs of a hub repository, and return the local folder.

    Args:
      repo_id: owner/name.
      files: their names, or patterns of them; none needs to be there.

    Raises:
      InputError: no such repository, or no access to it or to the hub.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(files)))
    except RepositoryNotFoundError as error:
        raise InputError(
            f"'{repo_id}' is not a folder here and not a public model on the hub; "
            "check the spelling, or log in with 'hf auth login' if it is gated or private"
        ) from error
    except Exception as error:  # the hub's, the connection's and the disk's errors have no common base
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"'{repo_id}' could not be downloaded ({why}); check the connection, or give a local folder") from error


def downloaded(repo_id: str) -> pathlib.Path | None:
    """Return the local folder of what was downloaded of a hub repository before, or None."""
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repo_id, local_files_only=True))
    except Exception:  # as in `download`; all of them mean that there is none
        return None


def read_params(folder: pathlib.Path, model: Network, dtype: jnp.dtype, mesh: Mesh | None) -> dict[str, Leaf]:
    """Stream every tensor of a checkpoint to its place, in `dtype`, or packed (`native_mxfp4`).

    A config that ties head and embedding is taken at its word as far as the files agree, as by transformers: either of them stands
    for both, equal ones are kept once, and different ones are both used.

    Args:
      folder: holds model.safetensors, or shards and model.safetensors.index.json.
      model: what the names and shapes must be.
      dtype: of the parameters.
      mesh: where to place them by their axes; None is the default device.

    Returns:
      The parameters by name; without `lm_head.weight` where the embedding serves as the head.

    Raises:
      InputError: files or tensors missing, unknown, of another shape, truncated, or not finite.
    """
    tied, expected = model.config.tied, stacked_experts.as_stored(folder, model.untied.tensors())
    either = tuple(expected[name].sources[0].names[0] for name in (HEAD, EMBEDDING)) if tied else ()
    packed = native_mxfp4.in_parts(folder, expected)
    parts = {name: tuple(packed[name].values()) if name in packed else (tensor,) for name, tensor in expected.items()}
    bytewise = tensors.stored_shapes({f"{name}.{role}": part for name in packed for role, part in packed[name].items()})
    floats = tensors.stored_shapes({name: tensor for name, tensor in expected.items() if name not in packed})
    located = weight_files.locate(folder, floats, tied=either, bytewise=bytewise)
    together = {}  # parameters by the files that hold them, so that each file is opened once
    for name in expected:
        names = [stored for tensor in parts[name] for source in tensor.sources for stored in source.names]
        if all(stored in located for stored in names):
            together.setdefault(tuple(dict.fromkeys(located[stored].file for stored in names)), []).append(name)
    params = {}
    with tqdm(total=sum(map(len, together.values())), desc="Loading weights", unit="tensor", disable=None, leave=False) as bar:
        for files, names in together.items():
            with contextlib.ExitStack() as stack:
                opened = {file: stack.enter_context(_opened(file)) for file in files}
                get = functools.partial(_get, opened, located)
                for name in names:
                    if name in packed:
                        leaf = native_mxfp4.read(files[0], name, packed[name], get)
                        params[name] = jax.block_until_ready(place_quantized(expected[name], leaf, mesh, dtype))
                    else:
                        array = tensors.read(expected[name], get)
                        params[name] = place_finite(name, array, dtype, mesh, expected[name], files[0])
                    bar.update()
    params = _tie(folder, params) if tied else params
    return {name: params[name] for name in expected if name in params}


def _tie(folder: pathlib.Path, params: dict[str, Leaf]) -> dict[str, Leaf]:
    """Return the parameters of a model whose config ties head and embedding."""
    if HEAD not in params:
        return params
    rest = {name: leaf for name, leaf in params.items() if name != HEAD}
    if EMBEDDING not in params:
        return rest | {EMBEDDING: params[HEAD]}
    if jnp.array_equal(cast(jax.Array, params[HEAD]), cast(jax.Array, params[EMBEDDING])):
        return rest
    warnings.warn(
        f"{folder}: config.json ties {HEAD} to the embedding, but the file holds another one, which is used; "
        'set "tie_word_embeddings": false to say so',
        stacklevel=3,
    )
    return params


@contextlib.contextmanager
def _opened(file: pathlib.Path):
    with _damage_named(file), safe_open(file, framework="np") as tensors:
        yield tensors


def _get(opened: dict, located: dict[str, weight_files.Place], name: str) -> np.ndarray:
    place = located[name]
    with _damage_named(place.file):
        return opened[place.file].get_tensor(place.name)


@contextlib.contextmanager
def _damage_named(file: pathlib.Path):
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or not a safetensors file ({reason(error)}); download it again") from error


def all_finite(array: np.ndarray) -> bool:
    """Return whether an array of bfloat16, float16 or float32 holds neither NaN nor infinity.

    By numpy, on the bits: XLA would compile a program for each shape.
    """
    bits = array.reshape(-1).view(f"uint{8 * array.itemsize}")
    # Without its sign a number is less than infinity as an integer too.
    infinity = np.asarray(np.inf, array.dtype).view(bits.dtype) << 1
    return all((bits[i : i + PART] << 1).max() < infinity for i in range(0, len(bits), PART))


def place_finite(
    name: str, array: np.ndarray, dtype: jnp.dtype, mesh: Mesh | None, tensor: Tensor, file: pathlib.Path
) -> jax.Array:
    """Put a parameter of a file where its axes say, in `dtype`, or in the one that it has in any model.

    Raises:
      InputError: it is not finite there.
    """
    dtype = jnp.dtype(tensor.dtype or dtype)
    with np.errstate(over="ignore"):  # an overflow to infinity is reported below, by name
        array = np.asarray(array, dtype)
    sharding = None if mesh is None else weight_sharding(tensor.axes, array.shape, mesh)
    if not all_finite(array):
        raise InputError(
            f"{file}: tensor {name} holds NaN or infinity in {jnp.dtype(dtype).name}; use an intact checkpoint or a wider dtype"
        )
    return jax.block_until_ready(place(array, sharding))
