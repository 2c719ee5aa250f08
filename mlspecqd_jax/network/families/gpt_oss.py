"""GPT-OSS (arXiv 2508.10925): sinks, sliding windows in every other layer, experts with biases whose activation is bounded."""

from typing import Any

from mlspecqd_jax.network.config import ClampedSwish, Config, Experts, Layer, Router
from mlspecqd_jax.network.families.common import PRE, Sources, attention, decoder, renamed, windows
from mlspecqd_jax.weights.tensors import Source

MLP = "model.layers.*.mlp"


def gpt_oss(c) -> Config:
    """Return the network of transformers' GptOssConfig, whose files hold gate and up by turns, of all experts in one tensor."""
    router = Router(c.num_local_experts, c.num_experts_per_tok, "softmax of chosen", bias=True)
    feed = Experts(router, c.intermediate_size, ClampedSwish(c.swiglu_alpha, c.swiglu_limit), bias=True)
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias, "sinks": True}
    layers = [Layer(attention(c, window=window, **own), feed, PRE) for window in windows(c)]
    rows = {"gate_proj": ("gate_up_proj", 2, 0, 1), "up_proj": ("gate_up_proj", 2, 1, 2), "down_proj": ("down_proj", 1, 0, None)}
    sources: Sources = renamed({f"{MLP}.gate": f"{MLP}.router"})
    for name, (stored, by_turns, start, stop) in rows.items():
        groups = router.experts * feed.size if by_turns == 2 else 1
        at = Source((f"{MLP}.experts.{stored}",), groups, start, stop, transpose=True, stack=router.experts)
        bias = at._replace(names=(f"{MLP}.experts.{stored}_bias",), transpose=False)
        sources += ((f"{MLP}.experts.{name}.weight", at), (f"{MLP}.experts.{name}.bias", bias))
    return decoder(c, layers, sources=sources)
