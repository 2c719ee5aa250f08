"""OLMo 2 (arXiv 2501.00656) and OLMo 3: norms after each part, and of whole queries and keys."""

from typing import Any

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import POST, attention, decoder, windows


def olmo2(c) -> Config:
    """Return the network of transformers' Olmo2Config."""
    return _olmo2(c, [c.rope_parameters] * c.num_hidden_layers)


def olmo3(c) -> Config:
    """Return the network of transformers' Olmo3Config, which has sliding windows, and a rope for each kind of layer."""
    return _olmo2(c, [c.rope_parameters[kind] for kind in c.layer_types])


def _olmo2(c, ropes):
    feed = GatedMLP(c.intermediate_size, c.hidden_act)
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias}
    own |= {"qk_norm": Norm(float(c.rms_norm_eps)), "qk_norm_of": "all"}
    mixers = [attention(c, rope, window=window, **own) for rope, window in zip(ropes, windows(c), strict=True)]
    return decoder(c, [Layer(mixer, feed, POST) for mixer in mixers])
