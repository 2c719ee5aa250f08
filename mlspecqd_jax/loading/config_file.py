"""config.json and generation_config.json: what they mean as a `Config`, and which ids end a text.

Every key that is read has a type and a range (`KEYS`, `ROPE_KEYS`), checked before anything is built. Absent keys take the defaults
of transformers' own config class, which is given the keys of the tables and nothing else of the file.
"""

import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import read_json, read_json_if_there, reason
from mlspecqd_jax.network.config import Config
from mlspecqd_jax.network.families import FAMILIES
from mlspecqd_jax.network.families.common import head_dim
from mlspecqd_jax.network.layers import ACTIVATIONS
from mlspecqd_jax.network.rope import ROPE_TYPES

# Multimodal models whose language model is one of FAMILIES, described by the key text_config.
WRAPPERS = {"gemma3": "gemma3_text"}
ROPE_BY_KIND = ("gemma3_text",)  # whose rope_parameters are one set for each of LAYER_TYPES
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class Rule(NamedTuple):
    """What a value may be: of one of `types`, a number from `least` to `most`, or null."""

    wanted: str
    types: tuple[type, ...]
    least: float = -math.inf
    most: float = math.inf
    null: bool = False

    def allows(self, value: Any) -> bool:
        if value is None:
            return self.null
        if type(value) not in self.types:  # a bool is no int here
            return False
        return not isinstance(value, int | float) or self.least <= value <= self.most

    def __str__(self) -> str:
        bounds = "" if self.least == -math.inf else f" from {self.least:,} to {self.most:,}"
        return f"{self.wanted}{bounds}{' or null' if self.null else ''}"


def _whole(least: int, most: int, null: bool = False) -> Rule:
    return Rule("a whole number", (int,), least, most, null)


def _number(least: float, most: float, null: bool = False) -> Rule:
    return Rule("a number", (int, float), least, most, null)


FLAG, TEXT, OBJECT, LIST = (
    Rule("true or false", (bool,)),
    Rule("text", (str,)),
    Rule("an object", (dict,), null=True),
    Rule("a list", (list,), null=True),
)
CAP = _number(1e-3, 1e6, null=True)
POSITIONS = 2**30  # int32 holds a position and a window beyond it
KEYS: dict[str, Rule] = {
    "vocab_size": _whole(1, 2**24),
    "hidden_size": _whole(1, 2**20),
    "intermediate_size": _whole(1, 2**22),
    "num_hidden_layers": _whole(1, 1024),
    "num_attention_heads": _whole(1, 4096),
    "num_key_value_heads": _whole(1, 4096, null=True),
    "head_dim": _whole(2, 2**14, null=True),
    "max_position_embeddings": _whole(1, POSITIONS),
    "rms_norm_eps": _number(0, 1),
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "use_sliding_window": FLAG,
    "sliding_window": _whole(1, POSITIONS, null=True),
    "sliding_window_pattern": _whole(1, 1024),
    "max_window_layers": _whole(0, POSITIONS),
    "layer_types": LIST,
    "rope_theta": _number(1, 1e15),
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "rope_local_base_freq": _number(1, 1e15),
    "partial_rotary_factor": _number(0, 1),
    "query_pre_attn_scalar": _number(1e-3, 1e6),
    "attn_logit_softcapping": CAP,
    "final_logit_softcapping": CAP,
    "use_bidirectional_attention": Rule("true or false", (bool,), null=True),
}
ROPE_KEYS: dict[str, Rule] = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": KEYS["rope_theta"],
    "partial_rotary_factor": KEYS["partial_rotary_factor"],
    "factor": _number(1e-3, 1e6),
    "low_freq_factor": _number(1e-3, 1e6),
    "high_freq_factor": _number(1e-3, 1e6),
    "original_max_position_embeddings": _whole(1, POSITIONS),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
# Why a family outside FAMILIES cannot be read, by a key that its config has.
REFUSALS = (
    (("kv_lora_rank",), "multi-head latent attention"),
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"), "a mixture of experts"),
    (("is_encoder_decoder",), "an encoder-decoder"),
    (("vision_config", "audio_config", "text_config"), "a multimodal model"),
    (("type_vocab_size",), "an encoder"),
)


def read_config(folder: pathlib.Path) -> Config:
    """Read config.json, of plain or quantized weights; absent keys take the defaults of transformers' own config class.

    Raises:
      InputError: what the model is that cannot be read, or which key is missing, of another type or out of range.
    """
    path = folder / "config.json"
    return config_of(path, read_json(path))


def config_of(path: pathlib.Path, raw: dict) -> Config:
    """Return what the contents of a config.json describe; messages name `path`, the file that says so.

    Raises:
      InputError: as `read_config`.
    """
    _refuse(path, raw)
    raw = _of_text(path, raw)
    family = raw["model_type"]
    _check_values(path, raw, family)
    c = _with_defaults(path, raw, family)

    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads or c.num_attention_heads
    if heads % kv_heads:
        raise InputError(f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    dim = head_dim(c)
    if dim < 2 or dim % 2:
        raise InputError(f"{path}: head_dim is {dim}, but rotary positions need an even one of at least 2; correct that key")
    act = "hidden_activation" if hasattr(c, "hidden_activation") else "hidden_act"
    if getattr(c, act) not in ACTIVATIONS:
        raise InputError(f"{path}: {act} {brief(getattr(c, act))} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if getattr(c, "use_bidirectional_attention", False):
        raise InputError(f"{path}: use_bidirectional_attention is not supported; only causal attention is")
    for rope in [c.rope_parameters[kind] for kind in LAYER_TYPES] if family in ROPE_BY_KIND else [c.rope_parameters]:
        _check_rope(path, rope)
    return FAMILIES[family](c)


def _refuse(path: pathlib.Path, raw: dict) -> None:
    family, supported = raw.get("model_type"), ", ".join((*FAMILIES, *WRAPPERS))
    if family is None:
        raise InputError(f"{path} has no key 'model_type'; add it (supported: {supported})")
    if not isinstance(family, str) or family not in (*FAMILIES, *WRAPPERS):
        why = next((kind for keys, kind in REFUSALS if any(raw.get(key) for key in keys)), "another architecture")
        raise InputError(f"{path}: model_type {brief(family)} is {why}, which is not supported; supported: {supported}")
    architectures = raw.get("architectures")
    named = [architectures] if isinstance(architectures, str) else architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"{path}: architectures is {brief(architectures)}, but must be a list of names; correct that key")
    heads = ("ForCausalLM", "ForConditionalGeneration") if family in WRAPPERS else ("ForCausalLM",)
    # One that was saved without its head; whether it needs one, the weights will tell.
    base = "".join(part.capitalize() for part in family.split("_")) + "Model"
    other = [name for name in named if not name.endswith(heads) and name != base]
    if other:
        raise InputError(
            f"{path}: architecture {brief(other[0])} has no language-model head; a ...ForCausalLM checkpoint is needed"
        )
    absent = [key for key in (("text_config",) if family in WRAPPERS else REQUIRED) if raw.get(key) is None]
    if absent:
        raise InputError(f"{path} has no key '{absent[0]}'; add it, or download the file again")


def _of_text(path: pathlib.Path, raw: dict) -> dict:
    """Return the keys of the language model: of a multimodal model, those of text_config, which writes no default."""
    if raw["model_type"] not in WRAPPERS:
        return raw
    text, family = raw["text_config"], WRAPPERS[raw["model_type"]]
    if not isinstance(text, dict) or text.get("model_type", family) != family:
        raise InputError(f"{path}: text_config is {brief(text)}, but must be an object of model_type {family}; correct that key")
    return text | {"model_type": family, "tie_word_embeddings": raw.get("tie_word_embeddings", True)}


def _check_values(path: pathlib.Path, raw: dict, family: str) -> None:
    """Raise an InputError unless every key that is read has its type and lies in its range."""
    _check_table(path, raw, KEYS)
    _check_rope_keys(path, raw.get("rope_scaling") or {}, "rope_scaling")
    ropes = raw.get("rope_parameters") or {}
    if family not in ROPE_BY_KIND:
        _check_rope_keys(path, ropes, "rope_parameters")
    elif any(kind not in LAYER_TYPES or not isinstance(rope, dict) for kind, rope in ropes.items()):
        raise InputError(f"{path}: rope_parameters is {brief(ropes)}, but must be an object for each of {', '.join(LAYER_TYPES)}")
    else:
        for kind, rope in ropes.items():
            _check_rope_keys(path, rope, f"rope_parameters: {kind}")
    kinds = raw.get("layer_types")
    layers = raw.get("num_hidden_layers", len(kinds or ()))  # text_config may leave it to the default
    if kinds is not None and (len(kinds) != layers or any(kind not in LAYER_TYPES for kind in kinds)):
        raise InputError(
            f"{path}: layer_types is {brief(kinds)}, but must name one of {', '.join(LAYER_TYPES)} for each of {layers} layers"
        )


def _check_rope_keys(path: pathlib.Path, rope: dict, name: str) -> None:
    if any(isinstance(value, dict) for key, value in rope.items() if key not in ROPE_KEYS):
        raise InputError(f"{path}: {name} differ between layers, which is not supported; only one set for all layers is")
    _check_table(path, rope, ROPE_KEYS, within=f"{name}: ")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError(f"{path}: rope_type {brief(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}")
    unknown = [key for key in rope if key not in ROPE_KEYS]
    if unknown:
        raise InputError(f"{path}: {name} has the key {brief(unknown[0])}, but may have {', '.join(ROPE_KEYS)}")


def _check_table(path: pathlib.Path, values: dict, rules: dict[str, Rule], within: str = "") -> None:
    for key, rule in rules.items():
        if key in values and not rule.allows(values[key]):
            raise InputError(f"{path}: {within}{key} is {brief(values[key])}, but must be {rule}; correct that key")


def _with_defaults(path: pathlib.Path, raw: dict, family: str):
    """Return transformers' config of the keys that are read; whatever its own validation raises becomes one sentence."""
    from transformers import CONFIG_MAPPING

    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}
    known |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # spellings of rope_parameters
    if family in ROPE_BY_KIND:
        known |= {"rope_local_base_freq", "sliding_window_pattern"}
    known |= {"head_dim"}  # which Qwen2 honours although its config class does not know it
    try:
        return CONFIG_MAPPING[family](**{key: raw[key] for key in KEYS if key in raw and key in known})
    except Exception as error:
        raise InputError(f"{path} is refused by transformers ({reason(error)}); correct that key") from error


def _check_rope(path: pathlib.Path, rope: dict[str, Any]) -> None:
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"{path}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; only 1 is")
    absent = [key for key in ROPE_TYPES[kind] if rope.get(key) is None]
    if absent:
        raise InputError(f"{path}: rope_type '{kind}' needs the key '{absent[0]}'")
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
