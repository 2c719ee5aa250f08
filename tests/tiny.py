"""Tiny random checkpoints of every family in Hugging Face's layout, with odd and unequal sizes that expose a swapped axis.

`FAMILIES` maps a name to its config.json. Weights are a function of the name alone, so the logits that
record_reference_logits.py recorded belong to them on every machine.
"""

import json
import pathlib
import types
import zlib

import numpy as np
from safetensors.numpy import save_file

from mlspecqd_jax.network.config import Config
from mlspecqd_jax.network.families import FAMILIES as NETWORKS

TOKENS = 2, 23  # batch and length of the recorded pass

_SIZES = {"vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 640, "rms_norm_eps": 1e-5}


def _config(model_type: str, **keys) -> dict:
    architecture = model_type.removesuffix("_text").capitalize() + "ForCausalLM"
    return {"model_type": model_type, "architectures": [architecture]} | _SIZES | keys


FAMILIES: dict[str, dict] = {
    # Every head has its own keys and values; head_dim and num_key_value_heads are left to their defaults.
    "llama2": _config("llama", hidden_size=60, intermediate_size=51, num_attention_heads=6),
    # Of the six rotary frequencies one is kept, one interpolated and four divided (`test_llama3_frequencies`).
    "llama3": _config(
        "llama",
        hidden_size=48,
        intermediate_size=56,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=12,
        num_hidden_layers=3,
        rope_theta=10000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 80,
        },
        tie_word_embeddings=True,
    ),
    "llama_linear": _config(
        "llama",
        hidden_size=40,
        intermediate_size=56,
        num_attention_heads=5,
        num_key_value_heads=1,
        rope_theta=5000.0,
        rope_scaling={"type": "linear", "factor": 2.5},
    ),
    "llama_bias": _config(
        "llama",
        hidden_size=42,
        intermediate_size=51,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu",
    ),
    "mistral": _config(
        "mistral",
        hidden_size=40,
        intermediate_size=56,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        sliding_window=7,
        rope_theta=1000.0,
    ),
    "qwen2": _config(
        "qwen2",
        hidden_size=36,
        intermediate_size=51,
        num_attention_heads=6,
        num_key_value_heads=3,
        rope_theta=1e6,
        tie_word_embeddings=True,
        sliding_window=5,  # of no effect without use_sliding_window
    ),
    "qwen2_window": _config(
        "qwen2",
        hidden_size=40,
        intermediate_size=51,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3": _config(
        "qwen3",
        hidden_size=40,
        intermediate_size=56,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        tie_word_embeddings=True,
    ),
    "qwen3_bias": _config(
        "qwen3",
        hidden_size=36,
        intermediate_size=51,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        attention_bias=True,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
    # Scores are not divided by the root of head_dim, and the caps bend what random weights give.
    "gemma2": _config(
        "gemma2",
        hidden_size=40,
        intermediate_size=56,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        head_dim=14,
        query_pre_attn_scalar=20,
        sliding_window=5,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=8.0,
    ),
    # Two local layers, a global one whose positions are stretched, and a local one; written as Gemma 3's first files are.
    "gemma3": _config(
        "gemma3_text",
        hidden_size=36,
        intermediate_size=51,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_hidden_layers=4,
        head_dim=10,
        query_pre_attn_scalar=10,
        sliding_window=6,
        sliding_window_pattern=3,
        rope_theta=20000.0,
        rope_local_base_freq=500.0,
        rope_scaling={"rope_type": "linear", "factor": 2.5},
        attn_logit_softcapping=4.0,  # of no effect
    ),
}
GEMMAS = ("gemma2", "gemma3_text")  # model types


def shape(vocab, hidden, middle, layers, heads, kv_heads, head_dim, positions, family="llama", **keys) -> Config:
    """Return a model's shape by its sizes, which transformers' own config class might refuse."""
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": middle, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    sizes |= {"max_position_embeddings": positions, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    kinds = ("sliding_attention", "full_attention")
    known = {
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "layer_types": [kinds[i % 2] for i in range(layers)],
    }
    known |= {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": head_dim}
    known |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    known["rope_parameters"] = dict.fromkeys(kinds, rope) if family == "gemma3_text" else rope
    return NETWORKS[family](types.SimpleNamespace(**(sizes | known | keys)))


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return the tensors that transformers writes for a config, by name: a second account beside the package's own."""
    c = config
    hidden, ffn, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    kv_heads = c.get("num_key_value_heads", heads)
    dim = c.get("head_dim", hidden // heads)
    gemma = c["model_type"] in GEMMAS
    output_bias = c.get("attention_bias", False)
    qkv_bias = output_bias or c["model_type"] == "qwen2"
    mlp_bias = c.get("mlp_bias", False)
    tensors = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        linears = {
            "self_attn.q_proj": (heads * dim, hidden, qkv_bias),
            "self_attn.k_proj": (kv_heads * dim, hidden, qkv_bias),
            "self_attn.v_proj": (kv_heads * dim, hidden, qkv_bias),
            "self_attn.o_proj": (hidden, heads * dim, output_bias),
            "mlp.gate_proj": (ffn, hidden, mlp_bias),
            "mlp.up_proj": (ffn, hidden, mlp_bias),
            "mlp.down_proj": (hidden, ffn, mlp_bias),
        }
        for name, (n, k, bias) in linears.items():
            tensors[f"{layer}.{name}.weight"] = (n, k)
            if bias:
                tensors[f"{layer}.{name}.bias"] = (n,)
        sandwich = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if gemma else ()
        for norm in ("input_layernorm", "post_attention_layernorm", *sandwich):
            tensors[f"{layer}.{norm}.weight"] = (hidden,)
        if c["model_type"] in ("qwen3", "gemma3_text"):
            for norm in ("q_norm", "k_norm"):
                tensors[f"{layer}.self_attn.{norm}.weight"] = (dim,)
    tensors["model.norm.weight"] = (hidden,)
    if not c.get("tie_word_embeddings", gemma):
        tensors["lm_head.weight"] = (c["vocab_size"], hidden)
    return tensors


def weights(config: dict, seed: str = "") -> dict[str, np.ndarray]:
    """Return random float32 weights at which logits are of order 1 to 10 and attention is far from even."""
    random = np.random.RandomState(zlib.crc32(seed.encode()))  # the generator whose stream numpy never changes
    drawn = {}
    for name, shape in shapes(config).items():
        noise = random.standard_normal(shape)
        if name.endswith("bias"):
            drawn[name] = 0.5 * noise
        elif len(shape) == 1:
            drawn[name] = (config["model_type"] not in GEMMAS) + 0.3 * noise  # to which Gemma adds one
        else:
            drawn[name] = 1.5 * noise / np.sqrt(shape[-1])
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def tokens(vocab: int = _SIZES["vocab_size"]) -> np.ndarray:
    """Return the token ids of the recorded pass, int32."""
    return np.random.RandomState(7).randint(0, vocab, TOKENS).astype(np.int32)


def write_checkpoint(folder: pathlib.Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> pathlib.Path:
    """Write a folder as transformers' save_pretrained does: one file, or `shards` files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard, names in enumerate(np.array_split(list(tensors), shards), 1):
        file = f"model-{shard:05}-of-{shards:05}.safetensors"
        save_file({str(name): tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= {str(name): file for name in names}
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_family(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Write the checkpoint of one family."""
    return write_checkpoint(folder, FAMILIES[name], weights(FAMILIES[name], name))
