"""GPT-NeoX (arXiv 2204.06745) and Pythia (arXiv 2304.01373): a part of each head rotated, products fused by heads in the file."""

from mlspecqd_jax.network.config import MLP, Config, Layer, Norm
from mlspecqd_jax.network.families.common import PRE, attention, decoder, fused_qkv, renamed

LAYER = "gpt_neox.layers.*"
NAMES = {"model.embed_tokens": "gpt_neox.embed_in", "model.norm": "gpt_neox.final_layer_norm"}
NAMES |= {f"model.layers.*.{norm}": f"{LAYER}.{norm}" for norm in PRE if norm}
NAMES |= {"model.layers.*.self_attn.o_proj": f"{LAYER}.attention.dense", "model.layers.*.mlp.up_proj": f"{LAYER}.mlp.dense_h_to_4h"}
NAMES |= {"model.layers.*.mlp.down_proj": f"{LAYER}.mlp.dense_4h_to_h"}


def gpt_neox(c) -> Config:
    """Return the network of transformers' GPTNeoXConfig."""
    mixer = attention(c, bias=c.attention_bias, output_bias=c.attention_bias)
    layer = Layer(mixer, MLP(c.intermediate_size, c.hidden_act, bias=True), PRE, parallel=c.use_parallel_residual)
    sources = renamed(NAMES) + fused_qkv(mixer, f"{LAYER}.attention.query_key_value", c.num_attention_heads)
    norm = Norm(float(c.layer_norm_eps), centered=True, bias=True)
    return decoder(c, [layer] * c.num_hidden_layers, norm=norm, sources=sources)
