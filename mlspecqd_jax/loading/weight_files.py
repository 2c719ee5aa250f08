"""Safetensors files of a checkpoint folder: where each tensor of a model lies, by the headers alone.

One file, model.safetensors, or else the shards that model.safetensors.index.json names; nothing outside the folder, and no other
kind of file, is ever opened. Names may lack `model.`, as those of a model that was saved without its head do, or have the prefix of
a multimodal model's language model. What no pass of the model would read is left out and named; whatever else the headers hold
beyond the model, or lack of it, is refused.
"""

import os
import pathlib
import re
import types
import warnings
from collections.abc import Container, Mapping
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import printable, read_json, reason

FILE, INDEX, SUFFIX = "model.safetensors", "model.safetensors.index.json", ".safetensors"
FLOATS, BYTES = ("F64", "F32", "F16", "BF16"), ("U8",)
# What a multimodal model's files put before the names of its language model, and what it is without.
PREFIXES = (
    (r"(model\.language_model|language_model\.model|model\.text_model)\.", "model."),
    (r"(language_model\.lm_head|embed_out)\.", "lm_head."),
)
MISSING = ("", "model.", "transformer.", "gpt_neox.")  # what names may lack, if anything
# Tensors that cannot change what a decoder of text puts out: buffers that are computed anew, scales of a quantized cache, heads for
# other tasks or further tokens, and what sees images.
BALLAST = (
    r"(.*\.)?rotary_emb\.\w+",
    r"(.*\.)?(position_ids|masked_bias|causal_mask)",
    r".*\.self_attn\.((attn\.)?[kvq]|kv|k_proj\.[kv]|v_proj\.[kv]|kv_cache|prob|prob_output)_(scale|zero_point|scaling_factor)",
    r".*\.self_attn\.(k|v)_proj\.output_scale",
    r"(score|classifier|qa_outputs|v_head|value_head|reward_head|regression_head)\..+",
    r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|mm_projector|connector)\..+",
    r"(model\.)?(audio_tower|embed_vision|embed_audio|vision_embedder)\..+",
    r"(model\.)?image_newline",
    r"mtp\..+",
    r".*\.(attn|attention)\.(bias|masked_bias)",
)

AHEAD = "eh_proj.weight"


class Header(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name


class Place(NamedTuple):
    """Where a tensor lies."""

    file: pathlib.Path
    name: str  # in the file


def locate(
    folder: pathlib.Path,
    expected: dict[str, tuple[int, ...]],
    *,
    tied: tuple[str, ...] = (),
    bytewise: Mapping[str, tuple[int, ...]] = types.MappingProxyType({}),
) -> dict[str, Place]:
    """Check every header of a folder against the expected names and shapes, and return where each tensor lies.

    Args:
      folder: of the checkpoint.
      expected: the shape of every tensor by name, the head included (`tensors.stored_shapes`).
      bytewise: the same of those that hold bytes.
      tied: head and embedding by the file's names, if they may be one; then either may be absent, and what is there is returned.

    Raises:
      InputError: files or tensors missing, unknown, of another shape or kind, truncated, or a name that stands for two tensors.
    """
    found, index = headers(folder)
    expected = expected | dict(bytewise)
    located, ignored, problems = {}, [], []
    # Layers behind the last that predict further tokens (GLM-4.5), which have a projection that no other layer has.
    ahead = tuple(place.name.removesuffix(AHEAD) for place in found if place.name.endswith(f".{AHEAD}"))
    for source, header in found.items():
        name = own_name(source.name, expected)
        if index is not None and index.get(source.name) != source.file:
            ignored.append(source.name)  # the index decides: another file's tensor is meant, or none
        elif name not in expected:
            known = source.name.startswith(ahead) or any(re.fullmatch(pattern, source.name) for pattern in BALLAST)
            known = known or _of_an_earlier_layer(source.name, expected)
            (ignored if known else problems).append(source.name if known else f"unknown tensor {source.name}")
        elif name in located:
            problems.append(f"both {located[name].name} and {source.name} are there")
        else:
            located[name] = source
            problems += _misfit(source.name, header, expected[name], BYTES if name in bytewise else FLOATS)
    optional = set(tied) if located.keys() & set(tied) else set(tied[:1])
    places = {own_name(place.name, expected): place for place in found}
    problems += [_missing(name, places.get(name), index) for name in expected if name not in located.keys() | optional]
    if problems:
        raise InputError(
            f"{folder} does not hold the model that its config.json describes: {some(problems, '; ')}; "
            "download the weights and config.json again from one source"
        )
    if ignored:
        warnings.warn(f"{folder}: left out what this model does not use: {some(ignored, ', ')}", stacklevel=2)
    return {name: located[name] for name in expected if name in located}


def own_name(name: str, expected: Container[str]) -> str:
    """Return the name that a network has for a tensor of a file, if it is one of those expected."""
    for pattern, prefix in PREFIXES:
        name = re.sub(f"^{pattern}", prefix, name)
    return next((prefix + name for prefix in MISSING if prefix + name in expected), f"model.{name}")


def _of_an_earlier_layer(name: str, expected: Container[str]) -> bool:
    """Return whether a tensor is for keys or values of a layer that has those of an earlier one (Gemma 4)."""
    found = re.fullmatch(r"(.*\.self_attn\.)[kv]_(proj|norm)\.(weight|bias)", name)
    return found is not None and [own_name(f"{found[1]}{x}_norm.weight", expected) in expected for x in "qk"] == [True, False]


def _misfit(name: str, header: Header, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> list[str]:
    if header.shape != shape:
        return [f"tensor {name} has shape {list(header.shape)}, but config.json asks for {list(shape)}"]
    if header.dtype not in dtypes:
        return [f"tensor {name} is stored as {header.dtype}, but must be one of {', '.join(dtypes)}"]
    return []


def _missing(name: str, elsewhere: Place | None, index: dict[str, pathlib.Path] | None) -> str:
    if elsewhere is None or index is None:
        return f"missing tensor {name}"
    meant = index.get(elsewhere.name)
    said = "leaves it out" if meant is None else f"looks for it in {meant.name}"
    return f"missing tensor {name} (it is in {elsewhere.file.name}, but {INDEX} {said})"


def some(words: list[str], separator: str) -> str:
    """Return the first three of what a message lists, and how many more there are."""
    more = f" (and {len(words) - 3} more)" if len(words) > 3 else ""
    return printable(separator.join(word[:200] for word in words[:3])) + more


def headers(folder: pathlib.Path) -> tuple[dict[Place, Header], dict[str, pathlib.Path] | None]:
    """Return the headers of all files, and the file of each name where an index says it."""
    if os.path.isfile(folder / FILE):  # an index beside it is stale; transformers reads the file too
        return _read_header(folder / FILE), None
    if os.path.isfile(folder / INDEX):
        index = _read_index(folder / INDEX)
        headers = {}
        for file in dict.fromkeys(index.values()):
            headers |= _read_header(file)
        return headers, index
    raise InputError(f"{folder} holds neither {FILE} nor {INDEX}; save the model with save_pretrained(folder)")


def _read_header(file: pathlib.Path) -> dict[Place, Header]:
    try:
        with safe_open(file, framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {Place(file, name): Header(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is truncated or not a safetensors file ({reason(error)}); download it again") from error


def _read_index(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the file of each tensor by name."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{path} has no key 'weight_map' that maps tensors to files; download it again")
    for name in dict.fromkeys(shards.values()):
        parts = pathlib.PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in name or not name.endswith(SUFFIX):
            raise InputError(f"{path} names {brief(name)}, which is not a {SUFFIX} file in the folder; download it again")
        if not os.path.isfile(path.parent / name):
            raise InputError(f"{path} names the shard {brief(name)}, which is not in the folder; download it")
    return {name: path.parent / shard for name, shard in shards.items()}
