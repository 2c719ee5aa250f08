"""Phi-1, Phi-1.5 (arXiv 2309.05463) and Phi-2: attention and MLP side by side, a part of each head rotated, biases everywhere."""

from mlspecqd_jax.network.config import MLP, Config, Layer, Norm
from mlspecqd_jax.network.families.common import attention, decoder, renamed

NAMES = {"self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
NAMES |= {"self_attn.q_norm": "self_attn.q_layernorm", "self_attn.k_norm": "self_attn.k_layernorm"}
NAMES = {f"model.layers.*.{name}": f"model.layers.*.{other}" for name, other in NAMES.items()}


def phi(c) -> Config:
    """Return the network of transformers' PhiConfig."""
    norm = Norm(float(c.layer_norm_eps), centered=True, bias=True)
    mixer = attention(c, bias=True, output_bias=True, qk_norm=norm if c.qk_layernorm else None)
    layer = Layer(mixer, MLP(c.intermediate_size, c.hidden_act, bias=True), ("input_layernorm", None, None, None), parallel=True)
    sources = renamed(NAMES | {"model.norm": "model.final_layernorm"})
    return decoder(c, [layer] * c.num_hidden_layers, norm=norm, head_bias=True, sources=sources)
