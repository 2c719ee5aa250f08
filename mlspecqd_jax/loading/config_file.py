"""config.json and generation_config.json: what they mean as a `Config`, and which ids end a text.

Every key that is read has a type and a range (`config_keys`), checked before anything is built. Absent keys take the defaults of
transformers' own config class, which is given the keys of the tables and nothing else of the file.
"""

import dataclasses
import json
import pathlib
from typing import Any

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import read_json, read_json_if_there, reason
from mlspecqd_jax.kept_values import kept_value
from mlspecqd_jax.loading.config_keys import KEYS, ROPE_KEYS, check_numbers, check_table
from mlspecqd_jax.loading.config_kinds import DELTA_NETS, check_delta_net, check_kinds, respelled
from mlspecqd_jax.loading.config_latents import check_latents
from mlspecqd_jax.loading.config_layers import GEMMA4, LAYER_TYPES, by_kind, check_routers, check_sizes_of_layers
from mlspecqd_jax.loading.unsupported import why
from mlspecqd_jax.network.config import Config
from mlspecqd_jax.network.families import FAMILIES
from mlspecqd_jax.network.families.common import head_dim
from mlspecqd_jax.network.layers import ACTIVATIONS
from mlspecqd_jax.network.rope import ROPE_TYPES, rotated

KIND = "configs"  # of the folder in the user's cache
# Multimodal models, and the families that their language model, described by the key text_config, may have; the first by default.
WRAPPERS = {
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "gemma4_unified": ("gemma4_unified_text",),
    "mistral3": ("mistral", "ministral3", "mistral4"),
    "qwen2_vl": ("qwen2_vl_text",),
    "qwen2_5_vl": ("qwen2_5_vl_text",),
    "qwen3_vl": ("qwen3_vl_text",),
    "llava": ("llama", "mistral", "qwen2"),
    "llava_next": ("llama", "mistral", "qwen2"),
    "llava_onevision": ("qwen2",),
    "internvl": ("qwen2", "qwen3", "llama"),
    "smolvlm": ("llama",),
    "idefics3": ("llama",),
    "llama4": ("llama4_text",),
    "kimi_k25": ("deepseek_v3",),
    "lfm2_vl": ("lfm2",),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
}
AS = {"kimi_k2": "deepseek_v3"}  # what a language model's own model_type stands for
WITHOUT_TEXT_CONFIG = ("qwen2_vl", "qwen2_5_vl")  # whose first files hold the language model's keys beside vision_config
# Families that may rotate a part of each head.
PARTIAL = ("phi3", "glm", "glm4", "phi", "gpt_neox", "stablelm", "nemotron", "glm4_moe", "minimax_m2", "mistral4", "lfm3")
PARTIAL += GEMMA4 + DELTA_NETS
PATTERNED = ("gemma3_text", "cohere2", "exaone4")  # families that know sliding_window_pattern
# What older files call a kind of rope; on a text, positions along three axes are the plain ones.
ROPE_NAMES = {"su": "longrope", "mrope": "default"}
ROPE_BY_KIND = ("gemma3_text", "olmo3", "lfm3", *GEMMA4)  # whose rope_parameters are one set for each of LAYER_TYPES
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


# Keys that must not be true.
UNSUPPORTED = {
    "use_bidirectional_attention": "only causal attention is",
    "alibi": "only rotary positions are",
    "add_cross_attention": "only a decoder of text alone is",
    "qk_layernorm": "only models without these norms are",
}


def read_config(folder: pathlib.Path) -> Config:
    """Read config.json, of plain or quantized weights; absent keys take the defaults of transformers' own config class.

    Raises:
      InputError: what the model is that cannot be read, or which key is missing, of another type or out of range.
    """
    path = folder / "config.json"
    raw = read_json(path)
    # Importing transformers, whose defaults it has, takes most of a second.
    return kept_value(KIND, json.dumps(raw), "transformers", lambda: config_of(path, raw))


def config_of(path: pathlib.Path, raw: dict) -> Config:
    """Return what the contents of a config.json describe; messages name `path`, the file that says so.

    Raises:
      InputError: as `read_config`.
    """
    _refuse(path, respelled(raw))
    raw = respelled(_of_text(path, raw))
    family = raw["model_type"]
    _check_values(path, raw, family)
    c = _with_defaults(path, raw, family)

    parts, dim = by_kind(path, c, family), 0
    for part in parts.values():
        heads, kv_heads = part.num_attention_heads, getattr(part, "num_key_value_heads", None) or part.num_attention_heads
        if heads % kv_heads:
            raise InputError(f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
        dim = head_dim(part)
        if dim < 2 or dim % 2:
            raise InputError(f"{path}: head_dim is {dim}, but rotary positions need an even one of at least 2; correct that key")
    acts = (key for key in ("hidden_activation", "hidden_act", "activation_function", "activation") if hasattr(c, key))
    act = next(acts, None)  # one that has no such key has one activation
    known = (*ACTIVATIONS, *(("xielu",) if family == "apertus" else ()))
    if act is not None and getattr(c, act) not in known:
        raise InputError(f"{path}: {act} {brief(getattr(c, act))} is not supported; supported: {', '.join(known)}")
    for key, instead in UNSUPPORTED.items():
        of_images = family in GEMMA4 and getattr(c, key, None) == "vision"  # not of a text
        if getattr(c, key, False) and not (key == "qk_layernorm" and family == "phi") and not of_images:
            raise InputError(f"{path}: {key} of {family} is not supported; {instead}")
    whole: Any = getattr(c, "rope_parameters", None)
    for kind, part in {} if whole is None else parts.items():
        _check_rope(path, whole[kind] if family in ROPE_BY_KIND else whole, head_dim(part), family)
    if (getattr(c, "rotary_dim", None) or 2) % 2 or (getattr(c, "rotary_dim", None) or 2) > dim:
        raise InputError(f"{path}: rotary_dim is {c.rotary_dim}, but must be even and at most {dim}, the size of a head")
    check_latents(path, c, family)
    check_delta_net(path, c, family)
    config = FAMILIES[family](c)
    check_routers(path, config)
    return config


def _refuse(path: pathlib.Path, raw: dict) -> None:
    # Whatever stands in a multimodal model is told by that model's name.
    family, supported = raw.get("model_type"), ", ".join(n for n in (*FAMILIES, *WRAPPERS) if not n.endswith("_text"))
    if family is None:
        raise InputError(f"{path} has no key 'model_type'; add it (supported: {supported})")
    if not isinstance(family, str) or family not in (*FAMILIES, *WRAPPERS):
        raise InputError(f"{path}: model_type {brief(family)} is {why(raw)}, which is not supported; supported: {supported}")
    architectures = raw.get("architectures")
    named = [architectures] if isinstance(architectures, str) else architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"{path}: architectures is {brief(architectures)}, but must be a list of names; correct that key")
    heads = ("ForCausalLM", "LMHeadModel", *(("ForConditionalGeneration",) if family in WRAPPERS else ()))
    # One that was saved without its head; whether it needs one, the weights will tell.
    base = f"{family.replace('_', '')}model"
    other = [name for name in named if not name.endswith(heads) and name.lower() != base]
    if other:
        raise InputError(
            f"{path}: architecture {brief(other[0])} has no language-model head; a ...ForCausalLM checkpoint is needed"
        )
    whole = family not in WRAPPERS or (family in WITHOUT_TEXT_CONFIG and raw.get("text_config") is None)
    absent = [key for key in (_required(family) if whole else ("text_config",)) if raw.get(key) is None]
    if absent:
        raise InputError(f"{path} has no key '{absent[0]}'; add it, or download the file again")


def _required(family: str) -> list[str]:
    """Return the keys that a family's config.json must have, as the family calls them."""
    from transformers import CONFIG_MAPPING

    described = CONFIG_MAPPING[WRAPPERS.get(family, (family,))[0]]
    fields = {field.name for field in dataclasses.fields(described)}
    names = (described.attribute_map.get(key, key) for key in REQUIRED)
    return [name for name in names if name in fields]


def _of_text(path: pathlib.Path, raw: dict) -> dict:
    """Return the keys of the language model: of a multimodal model, those of text_config, which writes no default."""
    if raw["model_type"] not in WRAPPERS:
        return raw
    text, families = raw.get("text_config"), WRAPPERS[raw["model_type"]]
    if text is None:
        return raw | {"model_type": families[0]}
    family = text.get("model_type", families[0]) if isinstance(text, dict) else None
    family = AS.get(family, family) if isinstance(family, str) else None
    if family not in families:
        known = " or ".join(families)
        raise InputError(f"{path}: text_config is {brief(text)}, but must be an object of model_type {known}; correct that key")
    return text | {"model_type": family, "tie_word_embeddings": _tied(raw, text)}


def _tied(raw: dict, text: dict) -> Any:
    """Return what a multimodal model says of its head: itself, or, where its class ties none, its language model."""
    from transformers import CONFIG_MAPPING

    fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[raw["model_type"]])}
    default = fields["tie_word_embeddings"]
    return raw.get("tie_word_embeddings", default) or (not default and text.get("tie_word_embeddings", False))


def _check_values(path: pathlib.Path, raw: dict, family: str) -> None:
    """Raise an InputError unless every key that is read has its type and lies in its range."""
    check_table(path, raw, KEYS)
    check_sizes_of_layers(path, raw)
    _check_rope_keys(path, raw.get("rope_scaling") or {}, "rope_scaling")
    ropes = raw.get("rope_parameters") or {}
    if family not in ROPE_BY_KIND:
        _check_rope_keys(path, ropes, "rope_parameters")
    elif any(kind not in LAYER_TYPES or not isinstance(rope, dict) for kind, rope in ropes.items()):
        raise InputError(f"{path}: rope_parameters is {brief(ropes)}, but must be an object for each of {', '.join(LAYER_TYPES)}")
    else:
        for kind, rope in ropes.items():
            _check_rope_keys(path, rope, f"rope_parameters: {kind}")
    check_kinds(path, raw, family)
    layers = raw.get("num_hidden_layers", len(raw.get("layer_types") or ()))  # text_config may leave it to the default
    for key in ("no_rope_layers", "layer_rope_theta", "moe_topk"):
        if isinstance(raw.get(key), list) and (
            raw[key] or family != "llama4_text"
        ):  # whose files say by none that it is the default
            check_numbers(path, key, raw[key], layers, least=0)


def _check_rope_keys(path: pathlib.Path, rope: dict, name: str) -> None:
    if any(isinstance(value, dict) for key, value in rope.items() if key not in ROPE_KEYS):
        raise InputError(f"{path}: {name} differ between layers, which is not supported; only one set for all layers is")
    check_table(path, rope, ROPE_KEYS, within=f"{name}: ")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in (*ROPE_TYPES, *ROPE_NAMES) and not (kind == "dynamic" and rope.get("alpha")):
        raise InputError(f"{path}: rope_type {brief(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}")
    unknown = [key for key in rope if key not in ROPE_KEYS]
    if unknown:
        raise InputError(f"{path}: {name} has the key {brief(unknown[0])}, but may have {', '.join(ROPE_KEYS)}")


def _with_defaults(path: pathlib.Path, raw: dict, family: str):
    """Return transformers' config of the keys that are read; whatever its own validation raises becomes one sentence."""
    from transformers import CONFIG_MAPPING

    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}
    if "rope_parameters" in known:  # its spellings
        known |= {"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"}
    if family in ROPE_BY_KIND:
        known |= {"rope_local_base_freq"}
    known |= {"full_attention_interval"} if family in DELTA_NETS else set()
    if family in PATTERNED:
        known |= {"sliding_window_pattern"}
    spelled = CONFIG_MAPPING[family].attribute_map
    known |= {"num_experts", "num_local_experts"} & {*spelled, *spelled.values()}
    known |= {"global_head_dim", "num_global_key_value_heads", "per_layer_config"} if family in GEMMA4 else set()
    known |= {"rotary_dim"} if family == "minimax_m2" else set()  # which becomes partial_rotary_factor
    known |= set() if hasattr(CONFIG_MAPPING[family], "head_dim") else {"head_dim"}
    known |= {"tie_word_embeddings"}  # which Qwen2 and its part of Qwen2-VL honour although their classes know none
    given: dict[str, Any] = {
        key: _renamed(raw[key]) if key in ("rope_scaling", "rope_parameters") else raw[key] for key in KEYS if key in raw
    }
    try:
        return CONFIG_MAPPING[family](**{key: value for key, value in given.items() if key in known})
    except Exception as error:
        raise InputError(f"{path} is refused by transformers ({reason(error)}); correct that key") from error


def _renamed(rope: dict | None) -> dict | None:
    """Return parameters of a rope with the kind's present name."""
    if rope is None or (kind := rope.get("rope_type", rope.get("type"))) not in ROPE_NAMES:
        return rope
    return {key: value for key, value in rope.items() if key != "type"} | {"rope_type": ROPE_NAMES[kind]}


def _check_rope(path: pathlib.Path, rope: dict[str, Any], dim: int, family: str) -> None:
    kind, part = rope["rope_type"], rope.get("partial_rotary_factor", 1)
    if part != 1 and (family not in PARTIAL or (family in GEMMA4 and kind != "proportional")):
        raise InputError(f"{path}: partial_rotary_factor {part} is not supported for {family}; only 1 is")
    size = rotated(rope, dim)
    if size < 2 or size % 2:
        raise InputError(
            f"{path}: partial_rotary_factor {part} rotates {size} of {dim} elements of a head; an even number is needed"
        )
    if kind == "dynamic" and family not in ("hunyuan_v1_dense", "hunyuan_v1_moe"):
        raise InputError(f"{path}: rope_type 'dynamic' changes what was computed of a text as it grows, which is not supported")
    growing = ("llama_4_scaling_beta", "original_max_position_embeddings") if family in ("ministral3", "mistral4") else ()
    absent = [key for key in (*ROPE_TYPES.get(kind, ()), *growing) if rope.get(key) is None]
    if absent:
        raise InputError(f"{path}: rope_type '{kind}' needs the key '{absent[0]}'")
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            check_numbers(path, name, rope[name], size // 2)
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise InputError(
            f"{path}: high_freq_factor {rope['high_freq_factor']} must be greater than low_freq_factor {rope['low_freq_factor']}"
        )


def eos_token_ids(folder: pathlib.Path, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a text: generation_config.json's eos_token_id (an int or a list), else config.json's.

    Of a multimodal model whose config.json has none, it is text_config's.

    Null and negative ids stand for none, and one beyond the vocabulary can never be chosen, so they are left out.

    Raises:
      InputError: an id is no whole number.
    """
    for name in ("generation_config.json", "config.json"):
        found = read_json_if_there(folder / name)
        ids, text = found.get("eos_token_id"), found.get("text_config")
        if ids is None and isinstance(text, dict):
            ids = text.get("eos_token_id")
        if ids is None:
            continue
        listed = ids if isinstance(ids, list) else [ids]
        bad = next((i for i in listed if i is not None and type(i) is not int), None)
        if bad is not None:
            raise InputError(
                f"{folder / name}: eos_token_id is {brief(ids)}, but must be a token id or a list of them; correct that key"
            )
        return tuple(dict.fromkeys(i for i in listed if i is not None and 0 <= i < vocab_size))
    return ()
