"""What the keys of a GGUF file mean as a config.json, by its architecture.

Every key of the architecture (`A.*`) is accounted for: read, known to say nothing that matters, or allowed one value only; any
other could make another model of it and is refused.
"""

from typing import Any

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.config_file import KEYS
from mlspecqd_jax.loading.gguf.reader import GGUF
from mlspecqd_jax.loading.gguf.rope import rope_scaling

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
GEMMAS = ("gemma2", "gemma3")
# config.json's name of a key; those of the second table need not be there.
NEEDED = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
OF_GEMMAS = {
    "attention.sliding_window": "sliding_window",
    "final_logit_softcapping": "final_logit_softcapping",
}
OWN = {  # where zero stands for none
    "llama": {"attention.sliding_window": "sliding_window"},  # Mistral's
    "gemma2": OF_GEMMAS | {"attn_logit_softcapping": "attn_logit_softcapping"},
    "gemma3": OF_GEMMAS | {"rope.freq_base_swa": "rope_local_base_freq"},
}
READ_ELSEWHERE = (
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scale_linear",
)
WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
ALLOWED: dict[str, Any] = {
    "attention.causal": True,
    "use_parallel_residual": False,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.max_alibi_bias": 0,
    "attention.clamp_kqv": 0,
    "pooling_type": 0,
}
PATTERN = {"gemma2": 2, "gemma3": 6}  # of so many layers the last attends to all positions, where no key says it
PATTERN_KEY = "attention.sliding_window_pattern"
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the size whose scores are scaled by the width of a head as if heads filled it


def architecture(file: GGUF) -> str:
    """Return a file's architecture.

    Raises:
      InputError: it is none that is read.
    """
    found = file.keys.get("general.architecture")
    if found not in ARCHITECTURES:
        raise InputError(
            f"{file.path} has the architecture {brief(found)}, which is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return found


def config_json(file: GGUF) -> dict[str, Any]:
    """Return the config.json that describes the same model.

    Raises:
      InputError: an architecture that is not read, or a key that is missing, differs between layers, or is not known.
    """
    kind = architecture(file)
    keys = {key.removeprefix(f"{kind}."): value for key, value in file.keys.items() if key.startswith(f"{kind}.")}
    own = OWN.get(kind, {})
    names = NEEDED | OPTIONAL | own
    keys = {key: value for key, value in keys.items() if key not in own or value != 0}
    _check(file, kind, keys, names)
    config: dict[str, Any] = {"model_type": {"gemma3": "gemma3_text"}.get(kind, kind)}
    config |= {names[key]: value for key, value in keys.items() if key in names}
    heads = config["num_attention_heads"]
    config = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads, "rope_theta": 10000.0} | config
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, config["head_dim"]) != config["head_dim"]:
            said = f"{file.path}: {kind}.{key} is {brief(keys[key])}"
            raise InputError(f"{said}, but only that of a whole head of queries, {config['head_dim']}, is supported")
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path} has no tensor token_embd.weight; download it again")
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    scaling = rope_scaling(file, config["rope_theta"], config["head_dim"])
    if scaling is not None:
        config["rope_scaling"] = scaling
    if kind in GEMMAS:
        return _gemma(file, kind, keys, config)
    if config.get("sliding_window"):
        config["model_type"] = "mistral"
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if kind == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    return config


def _check(file: GGUF, kind: str, keys: dict[str, Any], names: dict[str, str]) -> None:
    absent = next((key for key in NEEDED if key not in keys), None)
    if absent is not None:
        raise InputError(f"{file.path} has no key {kind}.{absent}; convert the model again")
    for key, value in keys.items():
        if key in ALLOWED and value != ALLOWED[key]:
            raise InputError(f"{file.path}: {kind}.{key} is {brief(value)}, which is not supported; only {ALLOWED[key]} is")
        if key in names and not KEYS[names[key]].allows(value):
            raise InputError(f"{file.path}: {kind}.{key} is {brief(value)}, but must be {KEYS[names[key]]} for all layers")
        if key not in (*names, *READ_ELSEWHERE, *WITHOUT_EFFECT, *ALLOWED) and not (key == PATTERN_KEY and kind in GEMMAS):
            said = f"{file.path} has the key {brief(f'{kind}.{key}')}"
            raise InputError(f"{said}, whose effect on the model is not known; use the original checkpoint")


def _gemma(file: GGUF, kind: str, keys: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return what Gemma's config.json has beside, by llama.cpp's rules for what no key says."""
    layers = config["num_hidden_layers"]
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == LARGEST[kind] else config["head_dim"]
    pattern = keys.get(PATTERN_KEY, PATTERN[kind])
    if type(pattern) is int and pattern >= 1:
        local = [i % pattern < pattern - 1 for i in range(layers)]
    elif isinstance(pattern, list) and len(pattern) == layers:
        local = [bool(here) for here in pattern]
    else:
        said = f"{file.path}: {kind}.{PATTERN_KEY} is {brief(pattern)}"
        raise InputError(f"{said}, but must say which of {layers} layers have a sliding window; convert the model again")
    if kind == "gemma3" and "sliding_window" not in config:
        local = [False] * layers
    more: dict[str, Any] = {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}
    more |= {"layer_types": ["sliding_attention" if here else "full_attention" for here in local]}
    more |= {"sliding_window": 4096} | ({"rope_local_base_freq": 10000.0} if kind == "gemma3" else {})
    return more | config
