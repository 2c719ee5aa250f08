"""GPT-J (EleutherAI): attention and MLP side by side, neighbouring pairs of a part of each head rotated."""

from mlspecqd_jax.network.config import MLP, Config, Layer, Norm
from mlspecqd_jax.network.families.common import attention, decoder, head_dim, renamed
from mlspecqd_jax.network.rope import rope_of

NAMES = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "model.layers.*.ln_1": "transformer.h.*.ln_1"}
NAMES |= {f"model.layers.*.self_attn.{x}_proj": f"transformer.h.*.attn.{x}_proj" for x in "qkv"}
NAMES |= {"model.layers.*.self_attn.o_proj": "transformer.h.*.attn.out_proj"}
NAMES |= {"model.layers.*.mlp.up_proj": "transformer.h.*.mlp.fc_in", "model.layers.*.mlp.down_proj": "transformer.h.*.mlp.fc_out"}


def gptj(c) -> Config:
    """Return the network of transformers' GPTJConfig."""
    size = head_dim(c) if c.rotary_dim is None else c.rotary_dim
    rope = rope_of({"rope_type": "default", "rope_theta": 10000.0}, size, interleaved=True)
    feed = MLP(c.n_inner or 4 * c.hidden_size, c.activation_function, bias=True)
    layer = Layer(attention(c, rope=rope), feed, ("ln_1", None, None, None), parallel=True)
    norm = Norm(float(c.layer_norm_epsilon), centered=True, bias=True)
    return decoder(c, [layer] * c.num_hidden_layers, norm=norm, head_bias=True, sources=renamed(NAMES))
