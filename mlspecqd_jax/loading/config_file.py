"""config.json and generation_config.json: what they mean as a `ModelConfig`, and which ids end a text.

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
from mlspecqd_jax.network.config import ModelConfig
from mlspecqd_jax.network.layers import ACTIVATIONS
from mlspecqd_jax.network.rope import RopeScaling

# Which optional tensors a family has; a string leaves it to config.json's key of that name.
FAMILIES: dict[str, dict] = {
    "llama": {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "qk_norm": True},
}
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


def _number(least: float, most: float) -> Rule:
    return Rule("a number", (int, float), least, most)


FLAG, TEXT, OBJECT, LIST = (
    Rule("true or false", (bool,)),
    Rule("text", (str,)),
    Rule("an object", (dict,), null=True),
    Rule("a list", (list,), null=True),
)
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
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "use_sliding_window": FLAG,
    "sliding_window": _whole(1, POSITIONS, null=True),
    "max_window_layers": _whole(0, POSITIONS),
    "layer_types": LIST,
    "rope_theta": _number(1, 1e15),
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "partial_rotary_factor": _number(0, 1),
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
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
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


def read_config(folder: pathlib.Path) -> ModelConfig:
    """Read config.json; absent keys take the defaults of transformers' own config class.

    Raises:
      InputError: what the model is that cannot be read, or which key is missing, of another type or out of range.
    """
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    _refuse(path, raw, family)
    _check_values(path, raw)
    c = _with_defaults(path, raw, family)

    flags = {name: getattr(c, key) if isinstance(key, str) else key for name, key in FAMILIES[family].items()}
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads or c.num_attention_heads
    if heads % kv_heads:
        raise InputError(f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    if head_dim < 2 or head_dim % 2:
        raise InputError(f"{path}: head_dim is {head_dim}, but rotary positions need an even one of at least 2; correct that key")
    if c.hidden_act not in ACTIVATIONS:
        raise InputError(f"{path}: hidden_act {brief(c.hidden_act)} is not supported; supported: {', '.join(ACTIVATIONS)}")
    theta, scaling = _rope(path, c)
    return ModelConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=float(c.rms_norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        hidden_act=c.hidden_act,
        tie_word_embeddings=c.tie_word_embeddings,
        sliding_windows=_sliding_windows(c),
        **flags,
    )


def _refuse(path: pathlib.Path, raw: dict, family: Any) -> None:
    supported = ", ".join(FAMILIES)
    if family is None:
        raise InputError(f"{path} has no key 'model_type'; add it (supported: {supported})")
    if not isinstance(family, str) or family not in FAMILIES:
        why = next((kind for keys, kind in REFUSALS if any(raw.get(key) for key in keys)), "another architecture")
        raise InputError(f"{path}: model_type {brief(family)} is {why}, which is not supported; supported: {supported}")
    architectures = raw.get("architectures")
    named = [architectures] if isinstance(architectures, str) else architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"{path}: architectures is {brief(architectures)}, but must be a list of names; correct that key")
    base = f"{family.capitalize()}Model"  # which was saved without its head; whether it needs one, the weights will tell
    other = [name for name in named if not name.endswith("ForCausalLM") and name != base]
    if other:
        raise InputError(
            f"{path}: architecture {brief(other[0])} has no language-model head; a ...ForCausalLM checkpoint is needed"
        )
    quantized = raw.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else "unknown method"
        raise InputError(
            f"{path}: the weights are quantized already ({brief(method)}); give the original BF16, FP16 or FP32 checkpoint"
        )
    absent = [key for key in REQUIRED if raw.get(key) is None]
    if absent:
        raise InputError(f"{path} has no key '{absent[0]}'; add it, or download the file again")


def _check_values(path: pathlib.Path, raw: dict) -> None:
    """Raise an InputError unless every key that is read has its type and lies in its range."""
    _check_table(path, raw, KEYS)
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        if any(isinstance(value, dict) for key, value in rope.items() if key not in ROPE_KEYS):
            raise InputError(f"{path}: {name} differ between layers, which is not supported; only one set for all layers is")
        _check_table(path, rope, ROPE_KEYS, within=f"{name}: ")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise InputError(f"{path}: rope_type {brief(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}")
        unknown = [key for key in rope if key not in ROPE_KEYS]
        if unknown:
            raise InputError(f"{path}: {name} has the key {brief(unknown[0])}, but may have {', '.join(ROPE_KEYS)}")
    kinds, layers = raw.get("layer_types"), raw["num_hidden_layers"]
    if kinds is not None and (len(kinds) != layers or any(kind not in LAYER_TYPES for kind in kinds)):
        raise InputError(
            f"{path}: layer_types is {brief(kinds)}, but must name one of {', '.join(LAYER_TYPES)} for each of {layers} layers"
        )


def _check_table(path: pathlib.Path, values: dict, rules: dict[str, Rule], within: str = "") -> None:
    for key, rule in rules.items():
        if key in values and not rule.allows(values[key]):
            raise InputError(f"{path}: {within}{key} is {brief(values[key])}, but must be {rule}; correct that key")


def _with_defaults(path: pathlib.Path, raw: dict, family: str):
    """Return transformers' config of the keys that are read; whatever its own validation raises becomes one sentence."""
    from transformers import CONFIG_MAPPING

    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}
    known |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # spellings of rope_parameters
    known |= {"head_dim"}  # which Qwen2 honours although its config class does not know it
    try:
        return CONFIG_MAPPING[family](**{key: raw[key] for key in KEYS if key in raw and key in known})
    except Exception as error:
        raise InputError(f"{path} is refused by transformers ({reason(error)}); correct that key") from error


def _rope(path: pathlib.Path, c) -> tuple[float, RopeScaling]:
    rope = dict(c.rope_parameters)
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"{path}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; only 1 is")
    absent = [key for key in ROPE_TYPES[kind] if rope.get(key) is None]
    if absent:
        raise InputError(f"{path}: rope_type '{kind}' needs the key '{absent[0]}'")
    scaling = RopeScaling(kind, **{key: rope[key] for key in ROPE_TYPES[kind]})
    if kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise InputError(
            f"{path}: high_freq_factor {scaling.high_freq_factor} must be greater than low_freq_factor {scaling.low_freq_factor}"
        )
    return float(rope["rope_theta"]), scaling


def _sliding_windows(c) -> tuple[int | None, ...]:
    window = getattr(c, "sliding_window", None)
    kinds = getattr(c, "layer_types", None) or ["sliding_attention"] * c.num_hidden_layers
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def eos_token_ids(folder: pathlib.Path, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a text: generation_config.json's eos_token_id (an int or a list), else config.json's.

    Null and negative ids stand for none, and one beyond the vocabulary can never be chosen, so they are left out.

    Raises:
      InputError: an id is no whole number.
    """
    for name in ("generation_config.json", "config.json"):
        ids = read_json_if_there(folder / name).get("eos_token_id")
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
