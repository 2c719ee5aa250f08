"""What families share: how transformers' config tells the sizes of a layer, and the names of its norms."""

from typing import Any

from mlspecqd_jax.network.config import Attention, Config, Layer, Norm
from mlspecqd_jax.network.rope import rope_of

# Norms before and after attention, before and after the MLP. `post_attention_layernorm` is what it says in the second alone.
PRE = ("input_layernorm", None, "post_attention_layernorm", None)
SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def head_dim(c) -> int:
    """Return the size of a head."""
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def windows(c) -> list[int | None]:
    """Return how many positions each layer sees, None where it sees all."""
    kinds = getattr(c, "layer_types", None) or ["sliding_attention"] * c.num_hidden_layers
    return [c.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def attention(c, rope: dict[str, Any] | None = None, **more) -> Attention:
    """Return a layer's attention, with keys and values of one size and scores times 1 / sqrt(D), unless `more` says otherwise.

    Args:
      c: transformers' config.
      rope: the layer's own rope_parameters; None is the model's.
      **more: fields of `Attention`.
    """
    dim = head_dim(c)
    known: dict[str, Any] = {
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads or c.num_attention_heads,
        "head_dim": dim,
        "value_dim": dim,
        "scale": dim**-0.5,
        "rope": rope_of(c.rope_parameters if rope is None else rope, dim),
    }
    return Attention(**(known | more))


def decoder(c, layers: list[Layer], **more) -> Config:
    """Return a model of these layers, with plain norms, unless `more`, fields of `Config`, says otherwise."""
    known: dict[str, Any] = {"norm": Norm(float(c.rms_norm_eps)), "tied": c.tie_word_embeddings}
    return Config(c.vocab_size, c.hidden_size, c.max_position_embeddings, tuple(layers), **(known | more))
