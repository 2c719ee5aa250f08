"""Command R (Cohere) and Command A (arXiv 2504.00698): one layer norm before attention and MLP side by side."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import attention, decoder, windows


def cohere(c) -> Config:
    """Return the network of transformers' CohereConfig."""
    norm = Norm(float(c.layer_norm_eps), centered=True)
    mixer = _attention(c, **({"qk_norm": norm, "qk_norm_of": "each"} if c.use_qk_norm else {}))
    return _cohere(c, [mixer] * c.num_hidden_layers)


def cohere2(c) -> Config:
    """Return the network of transformers' Cohere2Config, whose layers without a window know no positions."""
    return _cohere(c, [_attention(c, window=window, **({} if window else {"rope": None})) for window in windows(c)])


def _attention(c, **own):
    return attention(c, interleaved=True, bias=c.attention_bias, output_bias=c.attention_bias, **own)


def _cohere(c, mixers):
    feed = GatedMLP(c.intermediate_size, c.hidden_act)
    layers = [Layer(mixer, feed, ("input_layernorm", None, None, None), parallel=True) for mixer in mixers]
    return decoder(c, layers, norm=Norm(float(c.layer_norm_eps), centered=True), logit_scale=c.logit_scale)
