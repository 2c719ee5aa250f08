"""`ModelConfig`: the shape of a model, under the keys of its family's config.json."""

import dataclasses

from mlspecqd_jax.network.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model under Hugging Face's own keys; hashable, so that it can be static under jit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # one entry a layer; () means that every layer sees everything
