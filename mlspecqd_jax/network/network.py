"""`Network`: a model without its parameters, a pure function of them.

Parameters are one flat dict from Hugging Face's tensor names (`model.layers.0.self_attn.q_proj.weight`) to arrays, and module paths
are these names, so that importing a checkpoint renames nothing.

Notation: B batch, W window, V vocabulary. `start[r]` is the absolute position of the first token of row r's window.
"""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlspecqd_jax.network.attention import KVCache
from mlspecqd_jax.network.config import ModelConfig
from mlspecqd_jax.network.layers import Linear, Trunk
from mlspecqd_jax.weights.partition import cache_sharding


class Transformer(nnx.Module):
    """Tokens [B, W] at absolute positions `start[r]..start[r]+W-1` to logits [B, W, V] in f32, and to what they are read from.

    It always has an `lm_head`; a tied model is one whose parameters give it the embedding (see `Network`).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stddev: float = 0.02):
        init = nnx.initializers.normal(stddev)
        self.model = Trunk(config, init=init, rngs=rngs)
        self.lm_head = Linear(config.vocab_size, config.hidden_size, bias=False, init=init, rngs=rngs)

    def __call__(self, tokens, start, caches):
        x, caches = self.model(tokens, start, caches)
        with jax.named_scope("lm_head"):
            return self.lm_head(x, out_dtype=jnp.float32), caches, x


@dataclasses.dataclass(frozen=True)
class Network:
    """The static half of a model: a pure function of parameters, hashable, equal for equal shapes.

    A `speculation.protocols.Scorer`. `params` maps Hugging Face's tensor names to arrays; one without
    `lm_head.weight` is tied.
    """

    config: ModelConfig
    mesh: Mesh | None = None

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name, in the order of the layers."""
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        one = dataclasses.replace(self.config, num_hidden_layers=1, sliding_windows=())  # layers are alike, and each takes its time
        shapes = {}
        for repeated, group in itertools.groupby(_skeleton(one)[1].items(), lambda leaf: ".layers.0." in leaf[0]):
            layers = range(self.config.num_hidden_layers if repeated else 1)
            for i, (name, leaf) in itertools.product(layers, list(group)):
                shapes[name.replace(".layers.0.", f".layers.{i}.")] = leaf.shape
        return {name: shape for name, shape in shapes.items() if name not in tied}

    def init(self, seed: int, dtype: jnp.dtype = jnp.float32, stddev: float = 0.02) -> dict[str, jax.Array]:
        """Return random parameters: weights normal(0, stddev), norms one, biases zero."""
        state = nnx.state(Transformer(self.config, nnx.Rngs(seed), stddev))
        flat = {_name(path): leaf.get_value().astype(dtype) for path, leaf in nnx.to_flat_state(state)}
        return {name: flat[name] for name in self.shapes()}

    def init_cache(self, params: dict[str, jax.Array], batch: int, slots: int) -> list[KVCache]:
        """Return zeroed caches of `slots` positions for every layer, in the dtype of the embedding."""
        c = self.config
        shape = (batch, c.num_key_value_heads, slots, c.head_dim)

        def zeros():
            buffer = jnp.zeros(shape, params["model.embed_tokens.weight"].dtype)
            if self.mesh is None:
                return buffer
            return jax.lax.with_sharding_constraint(buffer, cache_sharding(shape, self.mesh))

        return [KVCache(zeros(), zeros()) for _ in range(c.num_hidden_layers)]

    def __call__(self, params, tokens: jax.Array, start: jax.Array, cache: list[KVCache] | None, *, features: bool = False):
        """Score a window and write it to the cache.

        Args:
          params: parameters by name.
          tokens: [B, W] token ids; -1 only pads.
          start: [B] absolute position of each row's first token.
          cache: caches of at least start + W positions, or None to attend within the window only.
          features: whether to hand up the hidden states after the last norm, from which the head reads.

        Returns:
          (logits f32 [B, W, V], updated cache or None, features [B, W, K] or None).
        """
        graphdef, leaves = _skeleton(self.config)
        head = params.get("lm_head.weight", params["model.embed_tokens.weight"])
        state = nnx.from_flat_state(
            [(_path(name), nnx.Param(head if name == "lm_head.weight" else params[name])) for name in leaves]
        )
        # What is traced here sees by this context that its weights are split.
        partitioned = contextlib.nullcontext() if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        with partitioned:
            logits, cache, hidden = nnx.merge(graphdef, state)(tokens, start, cache)
        return logits, cache, hidden if features else None


@functools.lru_cache(maxsize=32)
def _skeleton(config: ModelConfig):
    """Return (graph definition, abstract leaves by name) of a model of this shape."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    return graphdef, {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _name(path) -> str:
    return ".".join(map(str, path))


def _path(name: str):
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
