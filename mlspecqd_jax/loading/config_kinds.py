"""What config.json may call the kinds of a model's layers, by family, and older names of keys."""

import pathlib

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.config_layers import LAYER_TYPES

DELTA_NETS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
OTHER_LAYER_TYPES = {
    "llama4_text": ("full_attention", "chunked_attention"),
    **dict.fromkeys(DELTA_NETS, ("full_attention", "linear_attention")),
    "lfm2": ("full_attention", "conv"),
    "lfm2_moe": ("full_attention", "conv"),
    "lfm3": (*LAYER_TYPES, "conv"),
}
# By family, older names of keys, which transformers' config class takes for the ones that they are here.
OLDER = {
    "lfm2": {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
    "lfm2_moe": {"tie_embedding": "tie_word_embeddings"},
}


def respelled(raw: dict) -> dict:
    """Return the keys of a config.json by the names that they are read by, without what says nothing."""
    family = raw.get("model_type")
    if family == "qwen2_moe" and not raw.get("use_sliding_window"):  # then transformers writes a window of 0
        return {key: value for key, value in raw.items() if key != "sliding_window"}
    older = OLDER.get(family, {}) if isinstance(family, str) else {}
    return raw | {key: raw[old] for old, key in older.items() if old in raw}


def check_delta_net(path: pathlib.Path, c, family: str) -> None:
    """Raise an InputError unless value heads share key heads evenly, given transformers' config."""
    if family in DELTA_NETS and c.linear_num_value_heads % c.linear_num_key_heads:
        raise InputError(
            f"{path}: linear_num_value_heads {c.linear_num_value_heads} must be a multiple of linear_num_key_heads "
            f"{c.linear_num_key_heads}"
        )


def check_kinds(path: pathlib.Path, raw: dict, family: str) -> None:
    """Raise an InputError unless layer_types, where there are any, name a kind that the family knows for each layer."""
    kinds, known = raw.get("layer_types"), OTHER_LAYER_TYPES.get(family, LAYER_TYPES)
    layers = raw.get("num_hidden_layers", len(kinds or ()))  # text_config may leave it to the default
    if kinds is not None and (len(kinds) != layers or any(kind not in known for kind in kinds)):
        raise InputError(
            f"{path}: layer_types is {brief(kinds)}, but must name one of {', '.join(known)} for each of {layers} layers"
        )
