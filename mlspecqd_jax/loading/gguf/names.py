"""The names of a GGUF file's tensors, and how it keeps some otherwise than Hugging Face: rows in another order, or plus one.

Notation: N rows, K columns, D size of a head.
"""

import re

import numpy as np

from mlspecqd_jax.loading.gguf.architectures import GEMMAS
from mlspecqd_jax.network.config import Attention

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, architecture: str) -> str:
    """Return the name in a GGUF file of a tensor that Hugging Face calls `name`."""
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if layer is None:
        return f"{WHOLE[stem]}.{kind}"
    own = LAYER | SANDWICH if architecture in GEMMAS else LAYER
    return f"blk.{layer[1]}.{own[layer[2]]}.{kind}"


def row_order(name: str, architecture: str, mixer: Attention) -> np.ndarray | None:
    """Return which of the file's rows is each of Hugging Face's, int64 [N], or None where they are in the same order.

    The architecture llama rotates the pairs (2i, 2i + 1) of a head, and its files hold queries and keys, weights and biases, in
    that order; Hugging Face rotates (i, i + D/2).
    """
    heads = {"q_proj": mixer.heads, "k_proj": mixer.kv_heads}.get(name.split(".")[-2])
    if architecture != "llama" or heads is None:
        return None
    return np.arange(heads * mixer.head_dim).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def offset(name: str, architecture: str) -> float:
    """Return what the file's values have been increased by: Gemma multiplies by 1 + weight, and its files hold that sum."""
    return 1.0 if architecture in GEMMAS and name.endswith("norm.weight") else 0.0
