"""Precision by layer, found by the machine: what each weight costs in each format, and from that a format for each.

What was measured of a model is kept in the user's cache, by the weights' own bits, so that another budget takes no time.
"""

import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.keeping import keep, key_of
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.network.own_text import own_text
from mlspecqd_jax.network.sensitivity import costs, weights_of
from mlspecqd_jax.user_cache import cache_folder
from mlspecqd_jax.weights.cast import SEARCH, quantize
from mlspecqd_jax.weights.precision import assign

TEXTS, POSITIONS = 4, 64  # of the text that is measured on
SCALE_RULE = SEARCH
KEPT = "kept"  # what stands for the model's own weight in place of a format
VERSION = 1  # of how it is measured
# With a product that reads no more than the stored bytes: of these alone a search can gain.
ON_CPU, ELSEWHERE = ("mxfp4", "nvfp4", "int4", "uint4_g32", "int8"), ("mxfp4",)

Costs = Mapping[str, Mapping[str, float]]


def sensitivity(network: Network, params: Mapping[str, jax.Array], first: int) -> Costs:
    """Return, by weight and format, the divergence in nats a token that casting the one to the other costs the model.

    Args:
      network: of the model.
      params: its parameters, not quantized.
      first: the token with which the texts begin that the model writes for this.
    """
    platform = next(iter(next(iter(params.values())).devices())).platform
    formats = ON_CPU if platform == "cpu" else ELSEWHERE
    file = cache_folder("sensitivity") / f"{_key(network, params, formats, first)}.json"
    if file.is_file():
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass  # damaged: measured anew, and written over
    drawn, judged = jax.random.split(jax.random.key(0))
    tokens = own_text(network, dict(params), jnp.full((TEXTS,), first, jnp.int32), POSITIONS, drawn)
    found = costs(network, params, tokens, formats, SCALE_RULE, judged)
    keep(file, lambda opened: opened.write(json.dumps(found).encode()))
    return found


def policy_for(network: Network, params: Mapping[str, jax.Array], first: int, bits: float) -> dict[str, str | None]:
    """Return the format of each weight, None for the model's own, so that all take at most so many bits a weight on average.

    Raises:
      InputError: fewer bits than the smallest format takes.
    """
    found = sensitivity(network, params, first)
    weights = weights_of(network, params)
    sizes = {
        name: {format: _bits(weights[name], format) for format in each} | {KEPT: 8.0 * weights[name].nbytes}
        for name, each in found.items()
    }
    number = sum(w.size for w in weights.values())
    least = sum(min(each.values()) for each in sizes.values()) / number
    if bits < least:
        raise InputError(f"bits is {bits:g}, but the smallest formats take {least:.2f} bits a weight; give that or more")
    chosen = assign({name: {**each, KEPT: 0.0} for name, each in found.items()}, sizes, bits * number)
    return {name: None if format == KEPT else format for name, format in chosen.items()}


def _bits(w: jax.Array, format: str) -> float:
    stored = jax.eval_shape(lambda w: quantize(w, format), jax.ShapeDtypeStruct(w.shape, w.dtype))
    return 8.0 * sum(array.size * array.dtype.itemsize for array in stored.arrays.values())


def _key(network, params, formats, first) -> str:
    dtype = next(iter(params.values())).dtype.name
    return key_of(params, VERSION, repr(network.config), dtype, formats, SCALE_RULE, TEXTS, POSITIONS, first)
