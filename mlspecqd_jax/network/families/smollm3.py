"""SmolLM3 (Hugging Face): Llama's layers, some of which know no positions."""

import dataclasses
from typing import Any

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder, windows


def smollm3(c) -> Config:
    """Return the network of transformers' SmolLM3Config."""
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias}
    feed = GatedMLP(c.intermediate_size, c.hidden_act, c.mlp_bias)
    mixers = [attention(c, window=window, **own) for window in windows(c)]
    kinds = zip(mixers, c.no_rope_layers, strict=True)
    return decoder(c, [Layer(mixer if turned else dataclasses.replace(mixer, rope=None), feed, PRE) for mixer, turned in kinds])
