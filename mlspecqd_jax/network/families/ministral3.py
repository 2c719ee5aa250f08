"""Ministral 3 (Mistral AI): Llama's layers, whose queries grow with their position."""

import math

from mlspecqd_jax.network.config import Config, GatedMLP, Growth, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder, windows


def ministral3(c) -> Config:
    """Return the network of transformers' Ministral3Config."""
    beta, period = c.rope_parameters["llama_4_scaling_beta"], c.rope_parameters["original_max_position_embeddings"]
    factors = tuple(1 + beta * math.log(1 + i) for i in range(-(-c.max_position_embeddings // period)))
    feed = GatedMLP(c.intermediate_size, c.hidden_act)
    return decoder(c, [Layer(attention(c, window=window, growth=Growth(period, factors)), feed, PRE) for window in windows(c)])
