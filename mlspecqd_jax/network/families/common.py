"""What families share: how transformers' config tells the sizes of a layer, and the names of its norms."""

import itertools
from collections.abc import Mapping
from typing import Any

from mlspecqd_jax.network.config import Attention, Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.rope import rope_of
from mlspecqd_jax.weights.tensors import Source

Sources = tuple[tuple[str, Source], ...]

# Norms before and after attention, before and after the MLP. `post_attention_layernorm` is what it says in the second and third.
PRE = ("input_layernorm", None, "post_attention_layernorm", None)
SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
POST = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
EXPERT = ("gate_proj", "up_proj", "down_proj")


def head_dim(c) -> int:
    """Return the size of a head."""
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def windows(c) -> list[int | None]:
    """Return how many positions each layer sees, None where it sees all."""
    kinds = getattr(c, "layer_types", None) or ["sliding_attention"] * c.num_hidden_layers
    return [getattr(c, "sliding_window", None) if kind == "sliding_attention" else None for kind in kinds]


def attention(c, rope_parameters: dict[str, Any] | None = None, interleaved: bool = False, **more) -> Attention:
    """Return a layer's attention, with keys and values of one size and scores times 1 / sqrt(D), unless `more` says otherwise.

    Args:
      c: transformers' config.
      rope_parameters: the layer's own; None is the model's.
      interleaved: whether a rope's pairs are neighbours.
      **more: fields of `Attention`.
    """
    dim = head_dim(c)
    known: dict[str, Any] = {
        "heads": c.num_attention_heads,
        "kv_heads": getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        "head_dim": dim,
        "value_dim": dim,
        "scale": dim**-0.5,
    }
    if "rope" not in more:
        parameters = c.rope_parameters if rope_parameters is None else rope_parameters
        known["rope"] = rope_of(parameters, dim, c.max_position_embeddings, interleaved)
    return Attention(**(known | more))


def split(fused: str, parts: Mapping[str, int], groups: int = 1, transpose: bool = False) -> Sources:
    """Say that modules have their rows in one module of the file, in equal groups, one part of a group after another.

    Args:
      fused: name of the file's module; `*` stands for the number of a layer.
      parts: how many rows each module has in a group, by its name.
      groups: how many there are.
      transpose: whether the file holds [K, N].
    """
    stops = list(itertools.accumulate(parts.values()))
    starts = [stop - size for stop, size in zip(stops, parts.values(), strict=True)]
    named = zip(parts, starts, stops, strict=True)
    return tuple((name, Source((fused,), groups, start, stop, transpose)) for name, start, stop in named)


def fused_qkv(mixer: Attention, fused: str = "model.layers.*.self_attn.qkv_proj", groups: int = 1, **more) -> Sources:
    """Say that queries, keys and values of so many groups of heads have their rows in one module of the file (see `split`)."""
    sizes = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim, mixer.kv_heads * mixer.value_dim
    names = (f"model.layers.*.self_attn.{x}_proj" for x in "qkv")
    return split(fused, {name: size // groups for name, size in zip(names, sizes, strict=True)}, groups, **more)


def fused_gate(feed: GatedMLP) -> Sources:
    """Say that `gate_up_proj` holds the rows of the gate, and then those of what it gates."""
    names = (f"model.layers.*.mlp.{x}_proj" for x in ("gate", "up"))
    return split("model.layers.*.mlp.gate_up_proj", dict.fromkeys(names, feed.size))


def by_expert(number: int, at: str = "model.layers.*.mlp.experts", names: tuple[str, str, str] = EXPERT) -> Sources:
    """Say that gate, up and down of each of so many experts are modules of the file with these names, in `at`.0, `at`.1, ..."""
    own = (f"model.layers.*.mlp.experts.{name}" for name in EXPERT)
    files = (tuple(f"{at}.{i}.{name}" for i in range(number)) for name in names)
    return tuple((name, Source(stored)) for name, stored in zip(own, files, strict=True))


def stacked_experts(number: int, size: int, at: str = "model.layers.*.mlp.experts") -> Sources:
    """Say that `at` holds all experts in two tensors: of gate and up, rows of both for each, and of down."""
    parts = zip(EXPERT, ("gate_up_proj", "gate_up_proj", "down_proj"), (0, size, 0), (size, 2 * size, None), strict=True)
    own = "model.layers.*.mlp.experts"
    return tuple(
        (f"{own}.{name}.weight", Source((f"{at}.{file}",), number, start, stop, stack=number)) for name, file, start, stop in parts
    )


def shared_expert(at: str) -> Sources:
    """Say in which module of the file the shared expert's are."""
    return renamed({f"model.layers.*.mlp.shared_expert.{name}": f"model.layers.*.mlp.{at}.{name}" for name in EXPERT})


def renamed(names: Mapping[str, str]) -> Sources:
    """Say what modules are called in the file, by their own names."""
    return tuple((name, Source((other,))) for name, other in names.items())


def decoder(c, layers: list[Layer], **more) -> Config:
    """Return a model of these layers, with plain norms, unless `more`, fields of `Config`, says otherwise."""
    known: dict[str, Any] = {"tied": getattr(c, "tie_word_embeddings", False)}
    if "norm" not in more:
        known["norm"] = Norm(float(c.rms_norm_eps))
    return Config(c.vocab_size, c.hidden_size, c.max_position_embeddings, tuple(layers), **(known | more))
