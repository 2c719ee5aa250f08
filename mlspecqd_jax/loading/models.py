"""`load`: a demo, a folder (a converted one too), a GGUF file or a hub id to a `Model`; `convert`: a model to what loads faster."""

import dataclasses
import functools
import os
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlspecqd_jax import arguments, console, jax_settings, kept_programs
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.kept_values import JAX_KIND
from mlspecqd_jax.loading import checkpoint, config_file
from mlspecqd_jax.loading.find import find, is_path
from mlspecqd_jax.loading.gguf import reader
from mlspecqd_jax.loading.model import Model, stored_twin
from mlspecqd_jax.loading.origin import Origin, origin
from mlspecqd_jax.loading.quantized.method import Quantization, find_quantization
from mlspecqd_jax.loading.quantized.params import packed
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.text import chat
from mlspecqd_jax.text.card import Card
from mlspecqd_jax.user_cache import cache_folder, why_not_own
from mlspecqd_jax.weights.formats import FORMATS, check_format
from mlspecqd_jax.weights.placement import usable_mesh
from mlspecqd_jax.weights.quantization import Recipe, bits_of
from mlspecqd_jax.weights.quantized_array import Leaf
from mlspecqd_jax.weights.tensors import HEAD

DTYPES = ("bfloat16", "float32", "float16")
KINDS = (JAX_KIND, kept_programs.KIND, config_file.KIND)  # of what is kept to start sooner


@jax_settings.held
def load(
    model: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    twin_of: Model | None = None,
    dequantize: bool = False,
) -> Model:
    """Load a model from the demo family, a folder, a GGUF file, or the Hugging Face hub.

    Weights that somebody quantized (compressed-tensors, GPTQ, AWQ, AutoRound, FP8, ModelOpt, Quark, the types of a GGUF file) draft
    as they are stored for the model that they were made from, or are decoded to be a model: of a GGUF file without being asked, and
    a warning says from which types. Stderr tells whether such a draft shares a cache.

    Args:
      model: `demo`, `demo-small`, a folder (Hugging Face's layout, or one that `convert` wrote), a .gguf file (of a split model any
        of its files), or an owner/name id or owner/name/FILE.gguf of the hub.
      dtype: of weights and activations: bfloat16, float32 or float16.
      mesh: a device mesh with an axis named `model` to split the weights over (tensor parallelism); None is one device.
      twin_of: for quantized weights, the model that they are to draft for, whose dtype and mesh they take. Of the same network they
        must be its own weights, and are its twin, which shares its embedding and cache, where keys and values allow it.
      dequantize: decode quantized weights to `dtype`.

    Raises:
      InputError: one sentence on what is wrong with the name, the config or the weights.
    """
    arguments.choice("dtype", dtype, DTYPES)
    if mesh is not None:
        arguments.instance("mesh", mesh, Mesh, "a Mesh, such as jax.make_mesh((4,), ('model',)), or None")
    arguments.flag("dequantize", dequantize)
    if twin_of is not None:
        _check_original(twin_of, dequantize)
        dtype, mesh = twin_of.embedding.dtype.name, twin_of.network.mesh
    mesh = usable_mesh(mesh)
    folder = find(model)
    enable_compilation_cache()
    found = origin(folder)
    _check_use(folder, found.quantization, wanted=twin_of is not None or dequantize)
    config, tokenizer = found.config, found.tokenizer(None if twin_of is None else twin_of.card.tokenizer)
    card = Card(
        name=str(model),
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        tokenizer=tokenizer,
        eos_token_ids=found.eos_token_ids,
        chat_end_token_ids=tuple(i for i in chat.end_token_ids(tokenizer) if i < config.vocab_size),
    )
    if twin_of is not None:
        return _load_packed(folder, found, Network(config, mesh), card, twin_of)
    params: dict[str, Leaf] = {**found.params(Network(config, mesh), jnp.dtype(dtype), mesh)}
    if found.quantization is not None and folder.is_dir():
        console.say(f"{card.name}: weights of {found.quantization.method} decoded to {dtype}, not the original's")
    # What the files hold decides whether the embedding is the head too.
    network = Network(dataclasses.replace(config, tied=HEAD not in params), mesh)
    drafts = checkpoint.drafts(folder, dtype) if checkpoint.is_converted(folder) else ()
    return Model(network, params, card, folder, drafts=drafts)


def is_quantized(model: str | os.PathLike) -> bool:
    """Return whether a model's weights are quantized already; one of the hub is downloaded."""
    place = find(model)
    return reader.read(place).is_quantized if place.is_file() else find_quantization(place) is not None


def _load_packed(place: pathlib.Path, found: Origin, network: Network, card: Card, twin_of: Model) -> Model:
    assert found.quantization is not None  # else it would have been refused
    assert found.leaves is not None
    draft = packed(place, found.leaves(network), network, twin_of.network, cast(dict[str, jax.Array], twin_of.params))
    method = found.quantization.method
    formats = f"{card.name}: weights of {method} ({', '.join(draft.formats) or 'floats'})"
    if draft.own_cache is None:
        console.say(f"{formats} as the twin of {twin_of.card.name}, whose embedding and cache they share")
    else:
        console.say(f"{formats} with a cache of their own beside {twin_of.card.name}: {draft.own_cache}")
    return Model(draft.network, draft.params, card, place, recipe=Recipe(method))


def _check_original(twin_of: Any, dequantize: bool) -> None:
    arguments.instance("twin_of", twin_of, Model, "a Model, as mlsd.load returns it, or None")
    if dequantize:
        raise InputError("twin_of drafts with weights as they are stored, and dequantize=True decodes them; give one of the two")
    if twin_of.recipe is not None:
        raise InputError(f"twin_of is {twin_of.card.name}, which is quantized itself; give the original model")


def _check_use(folder: pathlib.Path, quantization: Quantization | None, wanted: bool) -> None:
    if quantization is None and wanted:
        raise InputError(f"{folder} says nothing of quantized weights; leave twin_of and dequantize out")
    if quantization is not None and not wanted and folder.is_dir():
        raise InputError(
            f"{quantization.file}: the weights are quantized already ({arguments.brief(quantization.method)}); give the original "
            "BF16, FP16 or FP32 checkpoint, for which these can draft (twin_of=target, --draft FOLDER), or decode them "
            "(dequantize=True, --dequantize)"
        )


@jax_settings.held
def convert(
    model: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    draft: str | None = None,
    calibrate: bool = False,
) -> pathlib.Path:
    """Write a model as an orbax checkpoint that `load` reads much faster than it imports the original.

    Args:
      model: as for `load`.
      folder: a new name.
      dtype: as for `load`; the weights are stored in it.
      draft: a format, such as mxfp4, in which the twin's quantized weights are stored too, for `Model.quantized` to find; or auto
        and bits, such as auto4.5, for `Model.quantized(bits=4.5)`.
      calibrate: store the calibrated twin, which `Model.quantized(..., calibrate=True)` finds, and no other.

    Raises:
      InputError: as for `load`, the format is unknown, or the folder exists already or cannot be written.
    """
    if draft is not None:
        arguments.instance("draft", draft, str, f"one of {', '.join(FORMATS)}, auto and bits (auto4.5), or None")
        if bits_of(draft) is None:
            check_format(draft)
    if arguments.flag("calibrate", calibrate) and draft is None:
        raise InputError("calibrate is for the weights of a draft, and there is none; give draft (--draft) a format, such as mxfp4")
    if not is_path(folder) or not os.fspath(folder):
        raise InputError(f"folder is {arguments.brief(folder)}, but must be the name of a new folder")
    folder = pathlib.Path(folder)
    checkpoint.check_new(folder)
    loaded = load(model, dtype=dtype)
    if loaded.holds_packed_weights:
        raise InputError(f"{model} holds weights in MXFP4 already, which cannot be converted; load it as it is")
    twins = {} if draft is None else dict([stored_twin(loaded, draft, calibrate)])
    checkpoint.save(folder, loaded.folder, loaded.params, twins)
    return folder


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless jax was told where to keep them (or not to)."""
    if jax.config.values["jax_compilation_cache_dir"] is not None or not jax.config.values["jax_enable_compilation_cache"]:
        return
    why_not = _why_not_kept()
    if why_not is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder(JAX_KIND)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@functools.cache
def _why_not_kept() -> str | None:
    """Say once why compiled programs are not kept, if they are not, and return it."""
    folders = [cache_folder(kind) for kind in KINDS]
    why_not = next(filter(None, map(why_not_own, folders)), None) if os.name == "posix" else None
    if why_not is not None:
        console.say(f"mlspecqd: {why_not}, so compiled programs are not kept; set XDG_CACHE_HOME to a folder of your own")
    return why_not
