"""GPT-2 (Radford et al., 2019) and SantaCoder (arXiv 2301.03988): learned positions, layer norms, an MLP without a gate."""

from mlspecqd_jax.network.config import MLP, Config, Layer, Norm
from mlspecqd_jax.network.families.common import Sources, attention, decoder, fused_qkv, head_dim, renamed
from mlspecqd_jax.weights.tensors import Source

NAMES = {"model.embed_tokens": "wte", "model.embed_positions": "wpe", "model.norm": "ln_f"}
NAMES |= {f"model.layers.*.{norm}": f"h.*.{norm}" for norm in ("ln_1", "ln_2")}
LINEAR = {"self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}


def gpt2(c) -> Config:
    """Return the network of transformers' GPT2Config, whose files hold [K, N]."""
    scale = head_dim(c) ** -0.5 if c.scale_attn_weights else 1.0
    by_layer = range(1, c.num_hidden_layers + 1) if c.scale_attn_by_inverse_layer_idx else [1] * c.num_hidden_layers
    return _gpt2(c, [scale / by for by in by_layer], c.num_attention_heads, groups=1, transpose=True)


def gpt_bigcode(c) -> Config:
    """Return the network of transformers' GPTBigCodeConfig."""
    scale, kv_heads = head_dim(c) ** -0.5 if c.scale_attn_weights else 1.0, 1 if c.multi_query else c.num_attention_heads
    return _gpt2(c, [scale] * c.num_hidden_layers, kv_heads, groups=kv_heads, transpose=False)


def _gpt2(c, scales, kv_heads, groups, transpose):
    mixers = [attention(c, rope=None, kv_heads=kv_heads, scale=scale, bias=True, output_bias=True) for scale in scales]
    feed = MLP(c.n_inner or 4 * c.hidden_size, c.activation_function, bias=True)
    layers = [Layer(mixer, feed, ("ln_1", None, "ln_2", None)) for mixer in mixers]
    sources: Sources = renamed({name: f"transformer.{other}" for name, other in NAMES.items()})
    linear = {f"model.layers.*.{name}": f"transformer.h.*.{other}" for name, other in LINEAR.items()}
    sources += tuple((name, Source((other,), transpose=transpose)) for name, other in linear.items())
    sources += fused_qkv(mixers[0], "transformer.h.*.attn.c_attn", groups, transpose=transpose)
    norm = Norm(float(c.layer_norm_epsilon), centered=True, bias=True)
    return decoder(c, layers, norm=norm, learned_positions=True, sources=sources)
