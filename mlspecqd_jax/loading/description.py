"""`describe`: what a model is, and what its passes, its cache and its twins would read, by its config.json or a GGUF file's header.

No weight is read and none is made: sizes come from `Network.tensors()` and from the formats.
"""

import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import read_json, read_json_if_there
from mlspecqd_jax.loading.config_file import config_of
from mlspecqd_jax.loading.find import find_config
from mlspecqd_jax.loading.native_mxfp4 import is_native
from mlspecqd_jax.loading.origin import origin
from mlspecqd_jax.loading.quantized.method import Quantization, quantization_of, reader_of
from mlspecqd_jax.network.config import Attention, Config, Experts
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.formats import FORMATS, format_of
from mlspecqd_jax.weights.quantization import default_policy, formats_of, with_head
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD, Tensor, parameters

SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
BFLOAT16 = 2  # bytes


def describe(model: str | os.PathLike, platform: str = "cpu") -> dict[str, Any]:
    """Return what a model that can be loaded is, as JSON knows it.

    Whether its head is the embedding is what its config.json says; a file that holds both is another matter.

    Args:
      model: as for `load`, or the path of a config.json alone. Of a hub id config.json alone is downloaded.
      platform: cpu, gpu or tpu, which decides whether a twin's tied head is an exception.

    Returns:
      By name: family, parameters; parameters_per_token, where a pass over one token reads less; bytes_in_bfloat16, pass_bytes (what
      such a pass reads of the weights), cache_bytes_per_token (of a row); where layers do not keep all positions, state_bytes (of a
      row, however long its text) and replay_bytes_per_token (of those that may be fed again); positions, vocabulary, layers, what
      else its small files tell; and twins, by format: bytes, what a twin adds, and part_of_pass, what its pass reads of pass_bytes.

    Raises:
      InputError: it is not supported; the sentence is what loading it would say.
    """
    config, told = _read(model)
    network = Network(config)
    tensors, mixers = network.tensors(), [layer.mixer for layer in config.layers]
    attention = [mixer for mixer in mixers if isinstance(mixer, Attention)]
    size, read = parameters(tensors), _read_by_a_pass(network)
    return {
        "model": str(model),
        **{key: told.pop(key) for key in ("source", "family")},
        "parameters": size,
        **({} if read == size else {"parameters_per_token": read}),
        "bytes_in_bfloat16": BFLOAT16 * size,
        "pass_bytes": BFLOAT16 * read,
        **_cache_bytes(network),
        "positions": config.max_positions,
        "vocabulary": config.vocab_size,
        "layers": f"{len(mixers)} x hidden {config.hidden_size}, "
        + ("" if len(attention) == len(mixers) else f"{len(attention)} of them of attention, ")
        + (f"{attention[0].heads} heads, {attention[0].kv_heads} key/value heads" if attention else "without heads"),
        **told,
        "twins": {name: twin for name in FORMATS if (twin := _twin(network, name, platform))},
    }


def lines(description: dict[str, Any]) -> str:
    """Return a description for people to read, a line for each thing that is told."""
    told = {key.replace("_", " "): _shown(value) for key, value in description.items() if key not in ("source", "twins")}
    told["model"] += f" ({description['source']})"
    twins = {
        f"twin in {name}": f"{twin['bytes']:,} bytes more, and a pass reads {twin['part_of_pass']:.3f} of the model's"
        for name, twin in description["twins"].items()
    }
    return "".join(f"{key + ':':26}{value}\n" for key, value in (told | twins).items())


def _read(model: str | os.PathLike) -> tuple[Config, dict[str, Any]]:
    """Return a model's config, and what its small files tell beside it, its source and family first."""
    place = find_config(model)
    if place.is_file() and place.suffix == ".json":
        raw = read_json(place)
        config, weights = config_of(place, raw), _weights(raw, quantization_of(place, raw))
        return config, {"source": f"{place} alone", "family": raw["model_type"], "weights": weights}
    found = origin(place)
    recorded = {key: found.recorded[key] for key in SAMPLING_KEYS if key in found.recorded}
    return found.config, {
        "source": found.kind,
        "family": found.family,
        **(found.facts or {"weights": _weights(read_json_if_there(place / "config.json"), found.quantization)}),
        "tokenizer": found.tokenizer_kind,
        "end_of_text_ids": list(found.eos_token_ids),
        "recorded_sampling": recorded,
    }


def _weights(raw: dict, quantization: Quantization | None) -> str:
    if quantization is None:
        return "plain, those of experts in MXFP4" if is_native(raw) else "plain"
    reader_of(quantization)  # or it is refused
    return f"quantized by {quantization.method}"


def _read_by_a_pass(network: Network) -> int:
    """Count the parameters that a pass over one token reads: all but an embedding that is not the head (`Model.pass_bytes`)."""
    tensors = network.tensors()
    return round(
        sum(
            math.prod(tensor.shape) * _part_read(network, name, tensor)
            for name, tensor in tensors.items()
            if network.config.tied or name != EMBEDDING
        )
    )


def _part_read(network: Network, name: str, tensor: Tensor) -> float:
    """Return what part of a parameter a pass over one token reads: of experts' weights those of the chosen ones."""
    if tensor.experts is None:
        return 1.0
    feed = network.config.layers[int(name.partition(".layers.")[2].partition(".")[0])].feed
    assert isinstance(feed, Experts)
    return feed.router.chosen / tensor.experts


def _cache_bytes(network: Network) -> dict[str, int]:
    """Return the bytes of a row's caches in bfloat16: for each token, and whatever its text's length, where that is not all."""
    embedding = {EMBEDDING: jax.ShapeDtypeStruct((network.config.vocab_size, network.config.hidden_size), jnp.bfloat16)}

    def size(slots: int, reach: int = 0) -> int:
        caches = jax.eval_shape(lambda params: network.reaching(reach).init_cache(params, 1, slots), embedding)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))

    found = {"cache_bytes_per_token": size(2) - size(1)}
    if network.reach is not None:
        found |= {"state_bytes": size(0), "replay_bytes_per_token": size(0, 2) - size(0, 1)}
    return found


def _twin(network: Network, format: str, platform: str) -> dict[str, Any] | None:
    """Return the bytes of a twin's own weights as they are stored, and of what its pass reads as a part of the model's.

    Some sizes cannot be cast to some formats; of them it is None.
    """
    tensors = with_head(network.tensors())
    try:
        formats = formats_of(tensors, format, default_policy(format, network.config.tied, platform))
    except InputError:
        return None
    own = {name: format_of(to).nbytes(*tensors[name].shape) for name, to in formats.items() if to is not None}
    part = {name: _part_read(network, name, tensor) for name, tensor in tensors.items()}
    shared = sum(
        BFLOAT16 * math.prod(tensor.shape) * part[name]
        for name, tensor in tensors.items()
        if name not in own and (name != EMBEDDING or HEAD not in own)
    )
    read = shared + sum(size * part[name] for name, size in own.items())
    return {"bytes": sum(own.values()), "part_of_pass": read / (BFLOAT16 * _read_by_a_pass(network))}


def _shown(value: Any) -> str:
    match value:
        case dict():
            return f"{json.dumps(value)} (not applied)" if value else "none"
        case list():
            return ", ".join(map(str, value)) or "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
    return str(value)
