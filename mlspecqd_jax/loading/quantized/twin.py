"""Whether a checkpoint that somebody quantized is a given model in fewer bits, by its weights, and what of the model it can share.

Methods move factors between norms, weights and heads (AWQ), so products are compared: the queries', keys', values' and gate's
weights times the norm before them, over some rows of every layer. A wrong reading of codes, scales or zeros shows there by how far
it is off. A cache can be shared where keys and values are the model's own up to rounding, which is more: no row may be scaled.

Notation: N outputs, K contracted, R rows that are compared.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.network.config import GatedMLP
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.cast import dequantize
from mlspecqd_jax.weights.formats import format_of
from mlspecqd_jax.weights.quantized_array import QuantizedArray

Leaves = Mapping[str, np.ndarray | QuantizedArray]

ROWS = 64
# Relative RMS error of the products: right readings are at .09 to .17 with codes of 4 bits, at .01 to .03 with more; zeros that are
# one off at .3 to .4, codes in a wrong order above 1, an inverted scale far above 10.
MOST_OF_4_BITS, MOST = 0.25, 0.1
CAUSES = (
    (10.0, "its scales are read wrongly"),
    (0.9, "its codes are in an order that is not known, or it is another model"),
    (0.0, "its zeros are stored in another way than its config says, or it is another model"),
)
MOST_SCALED = 0.1  # how far a row of keys or values may be from the model's in its least-squares factor
CHUNK = 2**22  # elements
OF_ALL_ROWS = ("order", "tensor_scale")  # arrays of a leaf, by role
FLOAT32 = jnp.dtype(jnp.float32)


def refuse_unlike(leaves: Leaves, network: Network, params: Mapping[str, jax.Array]) -> None:
    """Raise an InputError where some weight times its norm is not the model's up to the rounding of its format.

    Args:
      leaves: of the checkpoint, as they are stored.
      network: of both.
      params: the model's.
    """
    for name, ours, theirs in _products(leaves, network, params, ("q_proj", "k_proj", "v_proj", "gate_proj")):
        error, most = _error(ours, theirs), _most(leaves[name])
        if not error <= most:
            cause = next((cause for least, cause in CAUSES if error >= least), CAUSES[0][1])
            raise InputError(
                f"tensor {name} times its norm is off the model's by {error:.3g} of its size, where its format explains {most}: "
                f"{cause}; give the model that was quantized"
            )


def why_not_its_cache(leaves: Leaves, network: Network, params: Mapping[str, jax.Array]) -> str | None:
    """Return why keys and values are not the model's up to rounding, or None where they are."""
    for name, ours, theirs in _products(leaves, network, params, ("k_proj", "v_proj")):
        size = np.sum(theirs * theirs, axis=1)
        factors = np.sum(ours * theirs, axis=1)[size > 0] / size[size > 0]
        if (np.abs(factors - 1) > MOST_SCALED).any():
            worst = factors[np.argmax(np.abs(factors - 1))]
            return f"a row of {name} is {worst:.2f} times the model's"
    kinds = ("k_proj.bias", "v_proj.bias", "k_norm.weight")
    named = (name for name in leaves if name.endswith(kinds))
    other = next((name for name in named if not alike(leaves[name], params[name])), None)
    return None if other is None else f"{other} is not the model's"


def alike(ours: np.ndarray | QuantizedArray, theirs: jax.Array) -> bool:
    """Return whether an array is the model's up to the rounding of 16 bits, as no quantized one is."""
    if isinstance(ours, QuantizedArray) or ours.shape != theirs.shape:
        return False
    a, b = ours.reshape(-1), np.asarray(theirs).reshape(-1)
    pieces = (slice(i, i + CHUNK) for i in range(0, len(a), CHUNK))
    return all(_near(a[piece].astype(np.float32), b[piece].astype(np.float32)) for piece in pieces)


def stands_for(ours: np.ndarray | QuantizedArray, theirs: jax.Array) -> bool:
    """Return whether a weight is the model's in fewer bits, by some of its rows: its own array then serves in its place."""
    rows = _some(theirs)
    return isinstance(ours, QuantizedArray) and _error(_rows(ours, rows), np.asarray(theirs[rows], np.float32)) <= _most(ours)


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.sqrt(np.sum((ours - theirs) ** 2) / max(np.sum(theirs**2), np.finfo(np.float32).tiny)))


def _most(leaf: np.ndarray | QuantizedArray) -> float:
    """Return the largest error that a weight's format explains."""
    return MOST_OF_4_BITS if isinstance(leaf, QuantizedArray) and format_of(leaf.format).bits == 4 else MOST


def _some(weight: jax.Array) -> np.ndarray:
    """Return which rows are compared."""
    return np.unique(np.linspace(0, weight.shape[0] - 1, ROWS).round().astype(int))


def _near(a, b):
    return bool((np.abs(a - b) <= 2**-8 * np.abs(b) + 6e-8).all())


def _products(leaves: Leaves, network: Network, params: Mapping[str, jax.Array], kinds) -> Iterator[tuple]:
    """Yield (name, ours, theirs) of weights [R, K] times the norm of their input, in float32."""
    offset = network.config.norm.offset
    for i, layer in enumerate(network.config.layers):
        for kind in kinds:
            part, norm = "self_attn", layer.norms[0]
            if kind == "gate_proj":
                part, norm = "mlp", layer.norms[2] or (norm if layer.parallel else None)
                kind = kind if isinstance(layer.feed, GatedMLP) else "up_proj"
            norm = norm if network.config.norm.weight else None
            name, norm = f"model.layers.{i}.{part}.{kind}.weight", f"model.layers.{i}.{norm}.weight" if norm else None
            if name not in params:  # keys and values are an earlier layer's, or values what keys are
                continue
            rows = _some(params[name])
            ours, theirs = _rows(leaves[name], rows), np.asarray(params[name][rows], np.float32)
            if norm is not None:
                ours = ours * (offset + np.asarray(leaves[norm], np.float32))
                theirs = theirs * (offset + np.asarray(params[norm], np.float32))
            yield name, ours, theirs


def _rows(leaf: np.ndarray | QuantizedArray, rows: np.ndarray) -> np.ndarray:
    if isinstance(leaf, QuantizedArray) and format_of(leaf.format).rows == 1:
        arrays = {role: array if role in OF_ALL_ROWS else array[rows] for role, array in leaf.arrays.items()}
        return np.asarray(dequantize(dataclasses.replace(leaf, arrays=arrays, shape=(len(rows), leaf.shape[1])), FLOAT32))
    whole = dequantize(leaf, FLOAT32) if isinstance(leaf, QuantizedArray) else leaf
    return np.asarray(whole[rows], np.float32)
