"""Parameters from quantized weights of a folder or a GGUF file: packed, to draft for a model, or decoded, to be a model."""

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
from mlspecqd_jax.loading.quantized.twin import alike, refuse_unlike, stands_for, why_not_its_cache
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.cast import dequantize
from mlspecqd_jax.weights.quantization import place_quantized, with_head
from mlspecqd_jax.weights.quantized_array import Leaf, QuantizedArray
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD

Leaves = dict[str, np.ndarray | QuantizedArray]  # by the parameters' names, as they are stored


class Draft(NamedTuple):
    """A quantized checkpoint beside the model for which it drafts."""

    network: Network
    params: dict[str, Leaf]
    formats: tuple[str, ...]
    own_cache: str | None  # why it needs one; None where it is the model's twin


def leaves_of(path: pathlib.Path, quantization: Quantization, network: Network) -> Leaves:
    """Return what a folder holds; a head that is tied to an embedding like it is left out.

    Raises:
      InputError: a method, or what the folder holds, cannot be read.
    """
    leaves = dict(open_folder(path, network).leaves(reader_of(quantization)))
    if network.config.tied and HEAD in leaves:
        head = leaves.pop(HEAD)
        embedding = leaves.setdefault(EMBEDDING, head)
        if not (isinstance(head, np.ndarray) and isinstance(embedding, np.ndarray) and np.array_equal(head, embedding)):
            leaves[HEAD] = head
    return leaves


def decoded(path: pathlib.Path, leaves: Leaves, network: Network, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Return the parameters that the weights of a folder stand for, in `dtype`.

    Raises:
      InputError: they are not finite.
    """
    params, tensors = {}, network.untied.tensors()
    for name, leaf in leaves.items():
        array = np.asarray(dequantize(leaf, dtype)) if isinstance(leaf, QuantizedArray) else leaf
        params[name] = place_finite(name, array, dtype, network.mesh, tensors[name], path)
    return params


def packed(path: pathlib.Path, leaves: Leaves, network: Network, target: Network, params: Mapping[str, jax.Array]) -> Draft:
    """Return weights as they are stored, for a model's activations, with every plain array that is the model's shared.

    An embedding is looked up, not multiplied, so one in few bits is not kept: the model's own serves where that is what it stands
    for, else its values.

    Args:
      path: the folder or the file.
      leaves: what it holds, which is given up.
      network: what it says its network is, on the model's mesh.
      target: the model's network.
      params: the model's parameters.

    Raises:
      InputError: a model of the same network has other weights, or they are not finite.
    """
    shared: dict[str, Leaf] = {}
    if network.untied != target.untied:
        own_cache = "its network is another"
    else:
        refuse_unlike(leaves, target, params)
        own_cache = why_not_its_cache(leaves, target, params)
        theirs = {HEAD: params[EMBEDDING]} | dict(params)
        shared = {name: theirs[name] for name, leaf in leaves.items() if alike(leaf, theirs[name])}
        if stands_for(leaves[EMBEDDING], params[EMBEDDING]):
            shared[EMBEDDING] = params[EMBEDDING]
        if own_cache is None and EMBEDDING not in shared:
            own_cache = "its embedding is another"
        if own_cache is not None:
            shared.pop(EMBEDDING, None)  # by which twins are told
    tensors, dtype = with_head(network.untied.tensors()), params[EMBEDDING].dtype
    found: dict[str, Leaf] = {}
    for name in list(leaves):
        leaf = leaves.pop(name)
        if isinstance(leaf, QuantizedArray) and name == EMBEDDING and name not in shared:
            leaf = np.asarray(dequantize(leaf, dtype))
        if name in shared:
            found[name] = shared[name]
        elif isinstance(leaf, QuantizedArray):
            found[name] = jax.block_until_ready(place_quantized(tensors[name], leaf, network.mesh, dtype))
        else:
            found[name] = place_finite(name, leaf, dtype, network.mesh, tensors[name], path)
    formats = tuple(dict.fromkeys(leaf.format for leaf in found.values() if isinstance(leaf, QuantizedArray)))
    of_its_own = dataclasses.replace(network, config=dataclasses.replace(network.config, tied=HEAD not in found))
    return Draft(of_its_own if network.untied != target.untied else target, found, formats, own_cache)
