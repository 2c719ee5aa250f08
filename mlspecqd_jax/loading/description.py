"""`describe`: what a model is, and what its passes, its cache and its twins would read, by its config.json or a GGUF file's header.

No weight is read and none is made: sizes come from `Network.tensors()` and from the formats.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import read_json, read_json_if_there
from mlspecqd_jax.loading.config_file import config_of
from mlspecqd_jax.loading.find import find_config
from mlspecqd_jax.loading.native_mxfp4 import FORMAT as NATIVE
from mlspecqd_jax.loading.native_mxfp4 import is_native
from mlspecqd_jax.loading.origin import origin
from mlspecqd_jax.loading.quantized.method import Quantization, quantization_of, reader_of
from mlspecqd_jax.network.config import Attention, Config, LatentAttention
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
      row, however long its text) and replay_bytes_per_token (of those that may be fed again); positions, vocabulary, layers,
      embedding_by_layer (where there is one), what else its small files tell; and twins, by format: bytes, what a twin adds, and
      part_of_pass, what its pass reads of pass_bytes.

    Raises:
      InputError: it is not supported; the sentence is what loading it would say.
    """
    config, told, native = _read(model)
    network = Network(config)
    tensors = network.tensors()
    sizes, part = _sizes(tensors, native), network.parts_read()
    size = parameters(tensors)
    read, pass_bytes = (round(sum(of[name] * part[name] for name in tensors)) for of in (_numbers(tensors), sizes))
    return {
        "model": str(model),
        **{key: told.pop(key) for key in ("source", "family")},
        "parameters": size,
        **({} if read == size else {"parameters_per_token": read}),
        "bytes_in_bfloat16": BFLOAT16 * size,
        "pass_bytes": pass_bytes,
        **_cache_bytes(network),
        "positions": config.max_positions,
        "vocabulary": config.vocab_size,
        "layers": f"{len(config.layers)} x hidden {config.hidden_size}, {_heads(config)}",
        **_own_inputs(config),
        **told,
        "twins": {name: twin for name in FORMATS if (twin := _twin(network, name, platform, native))},
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


def _read(model: str | os.PathLike) -> tuple[Config, dict[str, Any], bool]:
    """Return a model's config, what its small files tell beside it, its source and family first, and if its experts are packed."""
    place = find_config(model)
    if place.is_file() and place.suffix == ".json":
        raw = read_json(place)
        config, weights = config_of(place, raw), _weights(raw, quantization_of(place, raw))
        return config, {"source": f"{place} alone", "family": raw["model_type"], "weights": weights}, is_native(raw)
    found = origin(place)
    raw = {} if place.is_file() else read_json_if_there(place / "config.json")
    recorded = {key: found.recorded[key] for key in SAMPLING_KEYS if key in found.recorded}
    told = {
        "source": found.kind,
        "family": found.family,
        **(found.facts or {"weights": _weights(raw, found.quantization)}),
        "tokenizer": found.tokenizer_kind,
        "end_of_text_ids": list(found.eos_token_ids),
        "recorded_sampling": recorded,
    }
    return found.config, told, is_native(raw)


def _heads(config: Config) -> str:
    mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, Attention | LatentAttention)]
    if not mixers:
        return "none of attention"
    kept = dict.fromkeys(
        f"latents of {m.latent} + {m.turned_dim}" if isinstance(m, LatentAttention) else str(m.kv_heads)
        for m in mixers
        if m.kept_by is None
    )
    what = "" if isinstance(mixers[0], LatentAttention) else " key/value heads"
    sharing = sum(m.kept_by is not None for m in mixers)
    part = "" if len(mixers) == len(config.layers) else f"{len(mixers)} of them of attention, "
    return f"{part}{mixers[0].heads} heads, {' or '.join(kept)}{what}" + f", {sharing} with those of earlier layers" * (sharing > 0)


def _own_inputs(config: Config) -> dict[str, str]:
    """Tell of an embedding that each layer has a part of."""
    own = config.layers[0].own
    if own is None:
        return {}
    row = own.layers * own.size
    return {"embedding_by_layer": f"{own.vocab_size * row:,} of the parameters, of which a token reads {row:,}"}


def _weights(raw: dict, quantization: Quantization | None) -> str:
    if quantization is None:
        return "plain, those of experts in MXFP4" if is_native(raw) else "plain"
    reader_of(quantization)  # or it is refused
    return f"quantized by {quantization.method}"


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: math.prod(tensor.shape) for name, tensor in tensors.items()}


def _packed(tensors: Mapping[str, Tensor], native: bool) -> set[str]:
    """Return the names of the parameters that the model itself has in MXFP4."""
    return {name for name, tensor in tensors.items() if native and tensor.linear and tensor.experts}


def _sizes(tensors: Mapping[str, Tensor], native: bool) -> dict[str, int]:
    """Return the bytes of every parameter of the model: in bfloat16, or of experts that are packed as those are."""
    sizes = {name: BFLOAT16 * numbers for name, numbers in _numbers(tensors).items()}
    return sizes | {name: FORMATS[NATIVE].nbytes(*tensors[name].shape) for name in _packed(tensors, native)}


def _cache_bytes(network: Network) -> dict[str, int]:
    """Return the bytes of a row's caches in bfloat16: for each token, and whatever its text's length, where that is not all."""
    embedding = {EMBEDDING: jax.ShapeDtypeStruct((network.config.vocab_size, network.config.hidden_size), jnp.bfloat16)}

    def size(slots: int, reach: int = 0) -> int:
        caches = jax.eval_shape(lambda params: network.reaching(reach).init_cache(params, 1, slots), embedding)
        of_rows = [leaf for leaf in jax.tree.leaves(caches) if leaf.ndim]  # and not a count of a mixture
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in of_rows)

    found = {"cache_bytes_per_token": size(2) - size(1)}
    if network.reach is not None:
        found |= {"state_bytes": size(0), "replay_bytes_per_token": size(0, 2) - size(0, 1)}
    return found


def _twin(network: Network, format: str, platform: str, native: bool) -> dict[str, Any] | None:
    """Return the bytes of a twin's own weights as they are stored, and of what its pass reads as a part of the model's.

    What the model has in the format already is not the twin's own. Some sizes cannot be cast to some formats, and packed experts to
    no other: of them it is None.
    """
    tensors = with_head(network.tensors())
    packed = _packed(tensors, native)
    try:
        formats = formats_of(tensors, format, default_policy(format, network.config.tied, platform))
    except InputError:
        return None
    if any(formats[name] != NATIVE for name in packed):
        return None
    sizes, part = _sizes(tensors, native), network.parts_read()
    own = {name: format_of(to).nbytes(*tensors[name].shape) for name, to in formats.items() if to and name not in packed}
    whole = sum(sizes[name] * each for name, each in part.items())
    part |= {HEAD: 1.0} | ({EMBEDDING: 0.0} if HEAD in own else {})
    if HEAD not in own and network.config.tied:
        part |= {HEAD: 0.0}  # which is the embedding
    sizes |= own
    read = sum(sizes[name] * part[name] for name in tensors)
    return {"bytes": sum(own.values()), "part_of_pass": read / whole}


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
