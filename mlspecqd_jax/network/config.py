"""What a decoder is made of: `Config`, its layers, and the parts of a layer, with all that varies between families and layers.

Parts are frozen and hashable, so that a network is static under jit. `families` makes them of a config.json.
"""

import dataclasses
from typing import Literal

from mlspecqd_jax.weights.tensors import Source


@dataclasses.dataclass(frozen=True)
class Norm:
    """y / sqrt(mean(y^2) + eps) * (offset + weight) + bias, with y = x, or x less its mean."""

    eps: float = 1e-6
    offset: float = 0.0
    centered: bool = False
    weight: bool = True  # else it is 1
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotation of pairs (i, i + R/2) of a head's first R elements by position * frequencies[i]; cos and sin times `magnitude`."""

    frequencies: tuple[float, ...]  # radians a position, [R / 2]
    magnitude: float = 1.0
    interleaved: bool = False  # the pairs are (2i, 2i + 1)


@dataclasses.dataclass(frozen=True)
class Growth:
    """What queries at position p are multiplied by: factors[(p + ahead) // period], behind the end the last."""

    period: int
    factors: tuple[float, ...]
    ahead: int = 0


@dataclasses.dataclass(frozen=True)
class Attention:
    """Grouped-query causal attention: softmax over cap * tanh(scale * q k / cap), and over a sink where there is one."""

    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys
    value_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None  # how many positions a query sees, its own among them; None is all up to it
    chunk: int | None = None  # size of a text's equal parts; a query sees nothing of those before its own
    qk_norm: Norm | None = None  # of queries and keys, before the rotation
    qk_norm_of: Literal["head", "each", "all"] = "head"  # one for every head, one for each, or one of all heads' elements together
    qk_norm_last: bool = False  # after the rotation
    growth: Growth | None = None
    clip: float | None = None  # bound of the magnitude of queries, keys and values, behind a norm of all heads' elements
    cap: float | None = None
    sinks: bool = False  # a learned logit for each head, whose probability goes to no value
    value_norm: Norm | None = None  # of each head's values
    values_of_keys: bool = False  # values are what keys are before their norm and rotation
    kept_by: int | None = None  # the number of an earlier layer, whose keys and values are those of this one
    bias: bool = False  # of queries, keys and values
    output_bias: bool = False
    gate: Literal["head", "element"] | None = None  # a sigmoid of another product with x for each, by which it is multiplied


@dataclasses.dataclass(frozen=True)
class ShortConv:
    """out(c * conv(b * u)) with b, c and u the thirds of in(x); conv sums so many positions of a channel, its own the last."""

    length: int
    bias: bool = False
    rope: None = None
    kept_by: None = None


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """out(norm(o) * silu(z(x))), o what a state says of the queries of positions that add a key and a value each (`delta_rule`).

    Queries, keys and values are act(conv(projections of x)), conv being as a `ShortConv`'s, and the former two are divided by their
    lengths. Value heads share key heads as query heads share keys in attention.
    """

    key_heads: int
    heads: int  # of values
    key_dim: int
    value_dim: int
    conv: int  # length of the convolution
    norm: Norm  # of each head of o
    act: str = "silu"
    rope: None = None
    kept_by: None = None


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Causal attention whose heads' keys and values are products with one latent of a position (`network.latent_attention`)."""

    heads: int
    latent: int  # its size
    query_latent: int | None  # size of another one, of which queries are products; None is what the layer reads
    key_dim: int  # of the part of a head's query and key that no rope turns
    turned_dim: int  # of the part that one does, whose key is of all heads
    value_dim: int
    scale: float
    rope: Rope
    norm: Norm  # of latents
    growth: Growth | None = None
    bias: bool = False  # of latents
    output_bias: bool = False
    kept_by: None = None


@dataclasses.dataclass(frozen=True)
class GatedMLP:
    """down(act(gate(x)) * up(x))."""

    size: int
    act: str = "silu"
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class ClampedSwish:
    """g * sigmoid(alpha * g) * (u + 1) of a gate and what it gates, g at most `limit` and u of at most that magnitude."""

    alpha: float
    limit: float


@dataclasses.dataclass(frozen=True)
class MLP:
    """down(act(up(x))); act may be xielu, which has parameters."""

    size: int
    act: str
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Router:
    """Which experts a position is given to, and what their results are multiplied by (`routing.route`)."""

    experts: int
    chosen: int  # of them for each position
    scores: Literal["softmax", "sigmoid", "softmax of chosen", "sigmoid of chosen"]  # of logits, which the last two choose by
    input_norm: Norm | None = None  # of what the logits are a product with
    scale: float = 1.0  # of logits
    bias: bool = False  # of logits
    choice_bias: bool = False  # of scores, for the choice alone
    groups: int = 1  # equal parts of the experts
    groups_chosen: int = 1  # by the sum of their best scores; the others' experts are not chosen
    group_best: int = 2  # how many scores are summed
    normed: bool = False  # factors are divided by their sum
    least_sum: float = 0.0  # by which they are at least divided
    factor: float = 1.0
    expert_factors: bool = False  # each expert has a factor of its own too


@dataclasses.dataclass(frozen=True)
class Experts:
    """The sum over the experts that a position is given to of factor * down(act(gate(x)) * up(x)), each with its own weights.

    With `weighs_input` it is x that is multiplied by the factor.
    """

    router: Router
    size: int
    act: str | ClampedSwish = "silu"
    bias: bool = False
    weighs_input: bool = False
    shared: GatedMLP | None = None  # whose result for every position is added
    shared_gate: bool = False  # times the sigmoid of another product with x
    norms: Norm | None = None  # of what the experts together are given and return, and of what the shared one is and does


@dataclasses.dataclass(frozen=True)
class OwnInput:
    """x = x + norm(down(act(gate(x)) * own)), behind the feed, with a layer's part of what `network.own_inputs` says of a token."""

    vocab_size: int
    size: int  # of a layer's part
    layers: int  # how many have one
    act: str


@dataclasses.dataclass(frozen=True)
class Layer:
    """h = n0(x); x = x + n1(mixer(h)); x = x + n3(feed(n2(x))), each norm by its name in the file, None being the identity."""

    mixer: Attention | LatentAttention | ShortConv | DeltaNet
    feed: GatedMLP | MLP | Experts
    norms: tuple[str | None, str | None, str | None, str | None]
    parallel: bool = False  # x = x + n1(mixer(h)) + n3(feed(n2(x))), or feed(h) without n2
    scale: float = 1.0  # of what n1 and n3 return
    own: OwnInput | None = None
    scalar: bool = False  # a parameter that what a layer returns is multiplied by


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder-only transformer."""

    vocab_size: int
    hidden_size: int
    max_positions: int
    layers: tuple[Layer, ...]
    norm: Norm  # of the layers and the last one
    tied: bool = False  # whether the embedding is the head too
    embed_scale: float = 1.0  # rounded to the embedding's dtype
    learned_positions: bool = False  # added to the embedding
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None  # logits are cap * tanh(logits / cap)
    # Where a file holds a module's tensors, or one parameter, if not under its own name; `*` stands for the number of a layer.
    sources: tuple[tuple[str, Source], ...] = ()

    def __hash__(self):
        # Compiled programs are looked up by it in every call, and all layers of a deep model take half a millisecond.
        return hash((self.vocab_size, self.hidden_size, self.max_positions, len(self.layers), self.layers[0], self.tied))
