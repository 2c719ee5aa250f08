"""A decoder-only Transformer (Llama, Mistral, Qwen2, Qwen3) with functional caches, in flax nnx.

Module paths are Hugging Face's tensor names (`model.layers.0.self_attn.q_proj.weight`), so parameters are one flat dict from
that name to its array, and importing a checkpoint renames nothing. How a weight is stored is the leaf's business: the same
module applied to other leaves is another model.

Notation: B batch, W window (the positions of one pass), S cache length, H query heads, Hkv key/value heads, D head size,
V vocabulary, K hidden size. `start[r]` is the absolute position of the first token of row r's window; the causal mask is
computed from absolute positions, so entries of the cache beyond a row's length are never read and need no trimming.
"""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlspecqd_jax.network.attention import KVCache, attend, finite, write
from mlspecqd_jax.network.matmul import linear
from mlspecqd_jax.network.moves import rows
from mlspecqd_jax.network.norms import rms_norm
from mlspecqd_jax.network.rope import RopeScaling, inverse_frequencies, rotary, rotate
from mlspecqd_jax.weights.partition import cache_sharding

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model under Hugging Face's own keys; hashable, so that it can be static under jit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # one entry a layer; () means that every layer sees everything


class Linear(nnx.Module):
    """x @ weight.T + bias with weight [N, K]."""

    def __init__(self, n: int, k: int, *, bias: bool, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (n, k)))
        self.bias = nnx.Param(jnp.zeros((n,))) if bias else None

    def __call__(self, x: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
        y = linear(x, self.weight.get_value(), out_dtype=out_dtype)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Embedding(nnx.Module):
    """weight[tokens] with weight [V, K]."""

    def __init__(self, vocab: int, k: int, *, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (vocab, k)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return rows(self.weight.get_value(), tokens)


class RMSNorm(nnx.Module):
    """`norms.rms_norm` with its weight [K]."""

    def __init__(self, k: int, eps: float):
        self.weight = nnx.Param(jnp.ones((k,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight.get_value(), self.eps)


class Attention(nnx.Module):
    """Grouped-query causal attention with rotary positions; softmax in f32."""

    def __init__(self, config: ModelConfig, layer: int, *, init, rngs: nnx.Rngs):
        c, heads, kv = config, config.num_attention_heads, config.num_key_value_heads
        self.heads, self.kv_heads, self.head_dim = heads, kv, c.head_dim
        self.sliding_window = c.sliding_windows[layer] if c.sliding_windows else None
        make = functools.partial(Linear, init=init, rngs=rngs)
        self.q_proj = make(heads * c.head_dim, c.hidden_size, bias=c.qkv_bias)
        self.k_proj = make(kv * c.head_dim, c.hidden_size, bias=c.qkv_bias)
        self.v_proj = make(kv * c.head_dim, c.hidden_size, bias=c.qkv_bias)
        self.o_proj = make(c.hidden_size, heads * c.head_dim, bias=c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def __call__(self, x, positions, rotation, cache: KVCache | None):
        """Return (output [B, W, K], updated cache); without a cache the window attends to itself alone."""
        batch, window, _ = x.shape
        q = self.q_proj(x).reshape(batch, window, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(batch, window, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(batch, window, self.kv_heads, self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, *rotation), rotate(k, *rotation), jnp.swapaxes(v, 1, 2)  # [B, heads, W, D]
        k, v = finite(k), finite(v)
        last = positions
        if cache is None:
            last = jnp.broadcast_to(jnp.arange(window), positions.shape)
        else:
            cache = write(cache, k, v, positions[:, 0])
            k, v = cache
        first = jnp.zeros_like(last) if self.sliding_window is None else last - self.sliding_window + 1
        out = attend(q, k, v, first, last)  # [B, W, H * D]
        return self.o_proj(out), cache


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, init, rngs: nnx.Rngs):
        make = functools.partial(Linear, bias=config.mlp_bias, init=init, rngs=rngs)
        self.gate_proj = make(config.intermediate_size, config.hidden_size)
        self.up_proj = make(config.intermediate_size, config.hidden_size)
        self.down_proj = make(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, layer: int, *, init, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, init=init, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, init=init, rngs=rngs)

    def __call__(self, x, positions, rotation, cache):
        attended, cache = self.self_attn(self.input_layernorm(x), positions, rotation, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nnx.Module):
    """Embedding, layers and final norm: tokens [B, W] to hidden states [B, W, K]."""

    def __init__(self, config: ModelConfig, *, init, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, init=init, rngs=rngs)
        self.layers = nnx.List([Block(config, i, init=init, rngs=rngs) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, tokens, start, caches):
        positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]  # [B, W]
        c = self.config
        rotation = rotary(positions, inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        x = self.embed_tokens(tokens)
        updated = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, cache = layer(x, positions, rotation, None if caches is None else caches[i])
            updated.append(cache)
        return self.norm(x), None if caches is None else updated


class Transformer(nnx.Module):
    """Tokens [B, W] at absolute positions `start[r]..start[r]+W-1` to logits [B, W, V] in f32.

    It always has an `lm_head`; a tied model is one whose parameters give it the embedding (see `LanguageModel`).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stddev: float = 0.02):
        init = nnx.initializers.normal(stddev)
        self.model = Decoder(config, init=init, rngs=rngs)
        self.lm_head = Linear(config.vocab_size, config.hidden_size, bias=False, init=init, rngs=rngs)

    def __call__(self, tokens, start, caches):
        x, caches = self.model(tokens, start, caches)
        with jax.named_scope("lm_head"):
            return self.lm_head(x, out_dtype=jnp.float32), caches


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The static half of a model: a pure function of parameters, hashable, equal for equal shapes.

    Implements the `Model` protocol of `speculation`. `params` maps Hugging Face's tensor names to arrays; one without
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

    def init_cache(self, batch: int, length: int, params: dict[str, jax.Array]) -> list[KVCache]:
        """Return zeroed caches of `length` positions for every layer, in the dtype of the embedding."""
        c = self.config
        shape = (batch, c.num_key_value_heads, length, c.head_dim)

        def zeros():
            buffer = jnp.zeros(shape, params["model.embed_tokens.weight"].dtype)
            if self.mesh is None:
                return buffer
            return jax.lax.with_sharding_constraint(buffer, cache_sharding(shape, self.mesh))

        return [KVCache(zeros(), zeros()) for _ in range(c.num_hidden_layers)]

    def __call__(self, params, tokens: jax.Array, start: jax.Array, cache: list[KVCache] | None):
        """Score a window and write it to the cache.

        Args:
          params: parameters by name.
          tokens: [B, W] token ids.
          start: [B] absolute position of each row's first token.
          cache: caches of at least start + W positions, or None to attend within the window only.

        Returns:
          (logits f32 [B, W, V], updated cache or None).
        """
        graphdef, leaves = _skeleton(self.config)
        head = params.get("lm_head.weight", params["model.embed_tokens.weight"])
        state = nnx.from_flat_state(
            [(_path(name), nnx.Param(head if name == "lm_head.weight" else params[name])) for name in leaves]
        )
        # What is traced here sees by this context that its weights are split.
        partitioned = contextlib.nullcontext() if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        with partitioned:
            return nnx.merge(graphdef, state)(tokens, start, cache)


@functools.lru_cache(maxsize=32)
def _skeleton(config: ModelConfig):
    """Return (graph definition, abstract leaves by name) of a model of this shape."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    return graphdef, {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _name(path) -> str:
    return ".".join(map(str, path))


def _path(name: str):
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
