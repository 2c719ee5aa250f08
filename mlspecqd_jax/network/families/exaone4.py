"""EXAONE 4 (arXiv 2507.11407): norms after each part; beside sliding windows, layers that see all know no positions."""

import dataclasses

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import POST, attention, decoder, windows


def exaone4(c) -> Config:
    """Return the network of transformers' Exaone4Config."""
    feed, norm = GatedMLP(c.intermediate_size, c.hidden_act), Norm(float(c.rms_norm_eps))
    mixers = [attention(c, window=window, qk_norm=norm) for window in windows(c)]
    turned = [mixer if mixer.window or not c.sliding_window else dataclasses.replace(mixer, rope=None) for mixer in mixers]
    return decoder(c, [Layer(mixer, feed, POST) for mixer in turned])
