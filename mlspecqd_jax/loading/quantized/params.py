"""Parameters from a folder of quantized weights: packed, to draft for a model, or decoded, to be a model."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlspecqd_jax.loading.huggingface import place_finite
from mlspecqd_jax.loading.quantized.folder import open_folder
from mlspecqd_jax.loading.quantized.method import Quantization, reader_of
from mlspecqd_jax.loading.quantized.twin import alike, refuse_unlike, why_not_its_cache
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.cast import dequantize
from mlspecqd_jax.weights.quantization import place_quantized, with_head
from mlspecqd_jax.weights.quantized_array import Leaf, QuantizedArray
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD


class Draft(NamedTuple):
    """A quantized checkpoint beside the model for which it drafts."""

    network: Network
    params: dict[str, Leaf]
    formats: tuple[str, ...]
    own_cache: str | None  # why it needs one; None where it is the model's twin


def decoded(path: pathlib.Path, quantization: Quantization, network: Network, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Return the parameters that a folder's weights stand for, in `dtype`.

    Raises:
      InputError: a method, or what the folder holds, cannot be read.
    """
    params, tensors = {}, network.untied.tensors()
    for name, leaf in _leaves(path, quantization, network).items():
        array = np.asarray(dequantize(leaf, dtype)) if isinstance(leaf, QuantizedArray) else leaf
        params[name] = place_finite(name, array, dtype, network.mesh, tensors[name], path)
    return params


def packed(
    path: pathlib.Path, quantization: Quantization, network: Network, target: Network, params: Mapping[str, jax.Array]
) -> Draft:
    """Return a folder's weights as they are stored, for a model's activations, with every plain array that is the model's shared.

    Args:
      path: the folder.
      quantization: what it says of its weights.
      network: what its config.json describes, on the model's mesh.
      target: the model's network.
      params: the model's parameters.

    Raises:
      InputError: a method, or what the folder holds, cannot be read; or a model of the same network has other weights.
    """
    leaves = _leaves(path, quantization, network)
    formats = tuple(dict.fromkeys(leaf.format for leaf in leaves.values() if isinstance(leaf, QuantizedArray)))
    shared: dict[str, Leaf] = {}
    if network.untied != target.untied:
        own_cache = "its network is another"
    else:
        refuse_unlike(leaves, target, params)
        own_cache = why_not_its_cache(leaves, target, params)
        theirs = {HEAD: params[EMBEDDING]} | dict(params)
        shared = {name: theirs[name] for name, leaf in leaves.items() if alike(leaf, theirs[name])}
        if own_cache is None and EMBEDDING not in shared:
            own_cache = "its embedding is another"
        if own_cache is not None:
            shared.pop(EMBEDDING, None)  # by which twins are told
    tensors, dtype = with_head(network.untied.tensors()), params[EMBEDDING].dtype
    found: dict[str, Leaf] = {}
    for name in list(leaves):
        leaf = leaves.pop(name)
        if name in shared:
            found[name] = shared[name]
        elif isinstance(leaf, QuantizedArray):
            found[name] = jax.block_until_ready(place_quantized(tensors[name].axes, leaf, network.mesh, dtype))
        else:
            found[name] = place_finite(name, leaf, dtype, network.mesh, tensors[name], path)
    of_its_own = dataclasses.replace(network, config=dataclasses.replace(network.config, tied=HEAD not in found))
    return Draft(of_its_own if network.untied != target.untied else target, found, formats, own_cache)


def _leaves(path: pathlib.Path, quantization: Quantization, network: Network) -> dict[str, np.ndarray | QuantizedArray]:
    """Return what a folder holds by the parameters' names; a head that is tied to an embedding like it is left out."""
    leaves = dict(open_folder(path, network).leaves(reader_of(quantization)))
    if network.config.tied and HEAD in leaves:
        head = leaves.pop(HEAD)
        embedding = leaves.setdefault(EMBEDDING, head)
        if not (isinstance(head, np.ndarray) and isinstance(embedding, np.ndarray) and np.array_equal(head, embedding)):
            leaves[HEAD] = head
    return leaves
