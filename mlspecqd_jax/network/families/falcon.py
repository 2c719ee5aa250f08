"""Falcon (arXiv 2311.16867): attention and MLP side by side, products fused by groups of heads in the file."""

from mlspecqd_jax.network.config import MLP, Config, Layer, Norm
from mlspecqd_jax.network.families.common import PRE, attention, decoder, fused_qkv, renamed

LAYER = "transformer.h.*"
ONE, TWO = ("input_layernorm", None, None, None), ("ln_attn", None, "ln_mlp", None)
NAMES = {"model.embed_tokens": "transformer.word_embeddings", "model.norm": "transformer.ln_f"}
NAMES |= {f"model.layers.*.{norm}": f"{LAYER}.{norm}" for norm in (*PRE, *TWO) if norm}
NAMES |= {"model.layers.*.self_attn.o_proj": f"{LAYER}.self_attention.dense"}
NAMES |= {"model.layers.*.mlp.up_proj": f"{LAYER}.mlp.dense_h_to_4h", "model.layers.*.mlp.down_proj": f"{LAYER}.mlp.dense_4h_to_h"}


def falcon(c) -> Config:
    """Return the network of transformers' FalconConfig without ALiBi."""
    kv_heads = c.num_kv_heads if c.new_decoder_architecture else 1 if c.multi_query else c.num_attention_heads
    norms = TWO if c.new_decoder_architecture and c.num_ln_in_parallel_attn != 1 else ONE if c.parallel_attn else PRE
    mixer = attention(c, kv_heads=kv_heads, bias=c.bias, output_bias=c.bias)
    layer = Layer(mixer, MLP(c.ffn_hidden_size, c.activation, c.bias), norms, parallel=norms != PRE)
    sources = renamed(NAMES) + fused_qkv(mixer, f"{LAYER}.self_attention.query_key_value", kv_heads)
    norm = Norm(float(c.layer_norm_epsilon), centered=True, bias=True)
    return decoder(c, [layer] * c.num_hidden_layers, norm=norm, sources=sources)
