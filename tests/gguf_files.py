"""Small GGUF files written by hand: from random blocks, from a tiny checkpoint of a family, or from a tokenizer's vocabulary."""

import pathlib
import struct

import ml_dtypes
import numpy as np
import tiny

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
TYPES |= {"BF16": 30, "MXFP4": 39, "IQ4_XS": 23, "Q2_K": 10, "NVFP4": 40}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
LAYER = {"input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
LAYER |= {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
LAYER |= {"post_attention_layernorm": "ffn_norm"}
GEMMA = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"}
GEMMA |= {"post_feedforward_layernorm": "post_ffw_norm"}


def value(given) -> bytes:
    """Return a key's type and value; a pair (type, bytes) is taken as it is."""
    match given:
        case (int(kind), bytes(data)):
            return struct.pack("<I", kind) + data
        case bool():
            return struct.pack("<I?", 7, given)
        case int():
            return struct.pack("<II", 4, given) if given >= 0 else struct.pack("<Ii", 5, given)
        case float():
            return struct.pack("<If", 6, given)
        case str():
            return struct.pack("<I", 8) + text(given)
        case list():
            items = [value(item) for item in given] or [value("")]
            return (
                struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(given)) + b"".join(i[4:] for i in items[: len(given)])
            )
    raise TypeError(given)


def text(given: str) -> bytes:
    data = given.encode()
    return struct.pack("<Q", len(data)) + data


def floats(array: np.ndarray, kind: str = "F32") -> tuple[str, np.ndarray, tuple[int, ...]]:
    """Return a tensor of floats as `write` takes it."""
    return kind, np.ascontiguousarray(array).astype(DTYPES[kind]).reshape(-1).view(np.uint8), array.shape


def write(path: pathlib.Path, keys: dict, tensors: dict, *, version: int = 3, alignment: int = 32, cut: int = 0) -> pathlib.Path:
    """Write a file.

    Args:
      path: a new name.
      keys: values by name.
      tensors: (name of the type, bytes, shape) by name.
      version: of the format.
      alignment: of the data.
      cut: so many bytes are left out at the end.
    """
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    head += b"".join(text(key) + value(given) for key, given in keys.items())
    data = b""
    for name, (kind, raw, shape) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += text(name) + sizes + struct.pack("<IQ", TYPES.get(kind, kind), len(data))
        data += raw.tobytes() + bytes(-raw.size % alignment)
    whole = head + bytes(-len(head) % alignment) + data
    path.write_bytes(whole[: len(whole) - cut])
    return path


def keys_of(config: dict, tokens: list[str] | None = None) -> dict:
    """Return the keys that describe a tiny checkpoint."""
    kind = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    heads = config["num_attention_heads"]
    own = {
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads", heads),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config.get("rope_theta", config.get("rope_parameters", {}).get("rope_theta", 10000.0))),
    }
    dim = config.get("head_dim", config["hidden_size"] // heads)
    own |= {"attention.key_length": dim, "attention.value_length": dim, "rope.dimension_count": dim}
    scaling = config.get("rope_scaling", {})
    if scaling.get("type", scaling.get("rope_type")) == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    if kind in ("gemma2", "gemma3", "llama") and "sliding_window" in config:
        own |= {"attention.sliding_window": config["sliding_window"]}
    if kind == "gemma2":
        own |= {"attn_logit_softcapping": config["attn_logit_softcapping"]}
        own |= {"final_logit_softcapping": config["final_logit_softcapping"]}
    if kind == "gemma3":
        own |= {"attention.sliding_window_pattern": config["sliding_window_pattern"]}
        own |= {"rope.freq_base_swa": config["rope_local_base_freq"]}
    return {"general.architecture": kind} | {f"{kind}.{key}": given for key, given in own.items()}


def tensors_of(config: dict, weights: dict[str, np.ndarray], kind: str = "F32") -> dict:
    """Return a tiny checkpoint's tensors as llama.cpp keeps them, matrices in a type of floats, vectors in F32."""
    return {gguf_name(name, config): floats(stored(name, w, config), kind if w.ndim > 1 else "F32") for name, w in weights.items()}


def gguf_name(name: str, config: dict) -> str:
    parts = name.split(".")
    if parts[1] != "layers":
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[
            ".".join(parts[:-1])
        ] + ".weight"
    own = LAYER | GEMMA if config["model_type"] in tiny.GEMMAS else LAYER
    return f"blk.{parts[2]}.{own[parts[-2]]}.{parts[-1]}"


def stored(name: str, w: np.ndarray, config: dict) -> np.ndarray:
    """Return a tensor as a file holds it: of Llama, the halves of each head's queries and keys interleaved; of Gemma, norms + 1."""
    if config["model_type"] in tiny.GEMMAS and name.endswith("norm.weight"):
        return w + np.float32(1)
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if config["model_type"] not in ("llama", "mistral") or heads is None:
        return w
    n = config.get(heads, config["num_attention_heads"])
    return np.stack([part for head in np.split(w, n) for pair in zip(*np.split(head, 2), strict=True) for part in pair])


def tokenizer_keys(model: str, tokens: list[str], types: list[int], **more) -> dict:
    """Return a tokenizer's keys; names in `more` lack the prefix."""
    keys = {"model": model, "tokens": tokens, "token_type": [(5, struct.pack("<i", kind)) for kind in types]}
    return {f"tokenizer.ggml.{name}": given for name, given in (keys | more).items()}


def model(path: pathlib.Path, config: dict, keys: dict | None = None, kind: str = "F32", **more) -> pathlib.Path:
    """Write a tiny checkpoint of a family as a GGUF file, with other keys beside, and other tensors in `more`."""
    tensors = tensors_of(config, tiny.weights(config), kind)
    return write(path, keys_of(config) | (keys or {}), tensors | more)
