"""`Network`: a model without its parameters, a pure function of them.

Parameters are one flat dict from Hugging Face's tensor names (`model.layers.0.self_attn.q_proj.weight`) to arrays, and module paths
are these names, so that importing a checkpoint renames nothing.

Notation: B batch, W window, V vocabulary. `start[r]` is the absolute position of the first token of row r's window.
"""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Generator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.network import delta_net, ops
from mlspecqd_jax.network.attention import ExpertsRead, KVCache
from mlspecqd_jax.network.config import Attention, Config, DeltaNet, Experts, LatentAttention, ShortConv
from mlspecqd_jax.network.layers import ALONG_N, Linear
from mlspecqd_jax.network.short_conv import ConvCache
from mlspecqd_jax.network.trunk import Trunk
from mlspecqd_jax.weights.placement import cache_sharding
from mlspecqd_jax.weights.quantized_array import Leaf
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD, Source, Tensor
from pallas_kernels import chip_of

Cache = KVCache | ConvCache | delta_net.DeltaCache | ExpertsRead | None
FIRST = ".layers.0."  # in the names of a first layer's parameters


class Transformer(nnx.Module):
    """Tokens [B, W] at absolute positions `start[r]..start[r]+W-1` to logits [B, W, V] in f32, and to what they are read from.

    Over a cache, positions that only pad are not in use (see `ops`); a pass without one, as derivatives are taken of, computes all.

    It always has an `lm_head`; a tied model is one whose parameters give it the embedding (see `Network`).
    """

    def __init__(self, config: Config, rngs: nnx.Rngs, stddev: float = 0.02):
        init = nnx.initializers.normal(stddev)
        self.model = Trunk(config, init=init, rngs=rngs)
        self.lm_head = Linear(config.vocab_size, config.hidden_size, axes=ALONG_N, bias=config.head_bias, init=init, rngs=rngs)
        self.scale, self.cap = config.logit_scale, config.logit_cap

    def __call__(self, tokens, start, caches, outermost=False):
        used = None if caches is None else _in_use(tokens)
        x, caches = self.model(tokens, start, caches, used, outermost)
        with jax.named_scope("lm_head"):
            logits = self.lm_head(x, used, jnp.float32)
            logits = logits if self.scale == 1 else self.scale * logits
            logits = logits if self.cap is None else self.cap * jnp.tanh(logits / self.cap)
            return logits, caches, x


@dataclasses.dataclass(frozen=True)
class Network:
    """The static half of a model: a pure function of parameters, hashable, equal for equal shapes.

    A `speculation.protocols.Scorer`. `params` maps Hugging Face's tensor names to arrays; one without
    `lm_head.weight` is tied.
    """

    config: Config
    mesh: Mesh | None = None
    kept: int = 0  # of `reach`, in layers that do not keep all positions
    outermost: bool = False  # whether no window later begins before one that it runs, as a target's

    @property
    def reach(self) -> int | None:
        """How many positions at the end of what was fed may be fed again; None is all (contract C15)."""
        all_kept = all(isinstance(layer.mixer, Attention | LatentAttention) for layer in self.config.layers)
        return None if all_kept else self.kept

    def reaching(self, positions: int, outermost: bool = False) -> "Network":
        """Return the same network with caches in which so many positions may be fed again.

        With `outermost` it is a target's: no window, of its own or of twins on its cache, begins before one that it ran.
        """
        return self if self.reach is None else dataclasses.replace(self, kept=positions, outermost=outermost)

    @property
    def of_a_draft(self) -> "Network":
        """The same network, to draft on the same cache."""
        return dataclasses.replace(self, outermost=False)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def untied(self) -> "Network":
        """The same network with a head of its own."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, tied=False))

    def tensors(self) -> dict[str, Tensor]:
        """Return what every parameter is, by name, in the order of the layers; a tied model has no head."""
        # Layers of one kind have the same parameters, and each takes its time.
        different = dict.fromkeys(self.config.layers)
        kinds = {layer: _skeleton(dataclasses.replace(self.config, layers=(layer,)))[1] for layer in different}
        found = {}
        for repeated, group in itertools.groupby(kinds[self.config.layers[0]].items(), lambda leaf: FIRST in leaf[0]):
            if not repeated:
                found |= dict(group)
                continue
            for i, layer in enumerate(self.config.layers):
                theirs = ((name, leaf) for name, leaf in kinds[layer].items() if FIRST in name)
                found |= {name.replace(FIRST, f".layers.{i}."): leaf for name, leaf in theirs}
        sources = dict(self.config.sources)
        tied = {HEAD} if self.config.tied else set()
        return {name: _tensor(name, leaf, sources) for name, leaf in found.items() if name not in tied}

    def init(self, seed: int, dtype: jnp.dtype = jnp.float32, stddev: float = 0.02) -> dict[str, jax.Array]:
        """Return random parameters: weights normal(0, stddev), norms one, biases zero."""
        state = nnx.state(Transformer(self.config, nnx.Rngs(seed), stddev))
        flat = {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
        return {name: flat[name].astype(tensor.dtype or dtype) for name, tensor in self.tensors().items()}

    def row_multiple(self, params: dict[str, Leaf]) -> int:
        """Return to how many rows windows are padded so that a row is computed alike in all of them (see `speculation.protocols`).

        Raises:
          InputError: no such number is known for these parameters where they lie.
        """
        embedding = cast(jax.Array, params[EMBEDDING])
        chip = chip_of(next(iter(embedding.devices())))
        weights = [params.get(name, embedding) for name in (HEAD, *(name for name, t in self.tensors().items() if t.linear))]
        found = ops.row_multiple(weights, embedding.dtype.name, chip, self.mesh)
        if found is None:
            raise InputError(
                f"exact=True cannot be promised for {embedding.dtype.name} on CPU without the C++ kernels, which take weights on "
                "one device; install a C++ compiler such as g++ if that is what is missing, use bfloat16, or pass exact=False "
                "(--inexact)"
            )
        return found

    def depends(self, params: dict[str, Leaf]) -> tuple[str, ...]:
        """Return what a program of these parameters depends on beside them; what it calls in C++ is known to XLA afterwards."""
        embedding = cast(jax.Array, params[EMBEDDING])
        return ops.depends(params.values(), embedding.dtype.name, chip_of(next(iter(embedding.devices()))), self.mesh)

    def narrower(self, params: dict[str, Leaf], whole: int) -> tuple[int, ...]:
        """Return the widths under `whole` at which a pass takes much less time, ascending (see `ops.narrower`)."""
        embedding = cast(jax.Array, params[EMBEDDING])
        return ops.narrower(whole, embedding.dtype.name, chip_of(next(iter(embedding.devices()))), self.mesh)

    def parts_read(self, rows: int | np.ndarray = 1) -> dict[str, Any]:
        """Return what part of each parameter a pass over so many rows reads, by name: of tables next to nothing.

        Of experts it is those that rows hit which choose by chance, each for itself: 1 - (1 - C / E)^rows. Real ones choose more
        alike, and hit fewer.
        """

        def of_experts(name):
            feed = self.config.layers[int(name.partition(".layers.")[2].partition(".")[0])].feed
            assert isinstance(feed, Experts)
            return 1 - (1 - feed.router.chosen / feed.router.experts) ** rows

        def part(name, tensor):
            if tensor.gathered and not (name == EMBEDDING and self.config.tied):
                return 0.0
            return 1.0 if tensor.experts is None else of_experts(name)

        return {name: part(name, tensor) for name, tensor in self.tensors().items()}

    def experts_read(self, cache: list[Cache]) -> jax.Array | None:
        """Return of how many experts a layer has read the weights so far, on average: f32 [], or None of a model without any."""
        last = cache[-1]
        return last.total if isinstance(last, ExpertsRead) else None

    def init_cache(self, params: dict[str, jax.Array], batch: int, slots: int) -> list[Cache]:
        """Return zeroed caches of `slots` positions in the dtype of the embedding, None for a layer that reads an earlier one's.

        Some layers keep the last few positions only (`reach`). Those of a mixture end with a count.
        """
        dtype = params[EMBEDDING].dtype

        def zeros(heads, size):
            buffer = jnp.zeros((batch, heads, slots, size), dtype)
            if self.mesh is None:
                return buffer
            return jax.lax.with_sharding_constraint(buffer, cache_sharding(buffer.shape, self.mesh))

        def of(m):
            match m:
                case LatentAttention():
                    return KVCache(zeros(1, m.latent + m.turned_dim), None)
                case ShortConv():
                    return ConvCache(jnp.zeros((batch, m.length - 1 + self.kept, self.config.hidden_size), dtype))
                case DeltaNet():
                    return delta_net.empty(m, batch, self.kept, dtype)
            return None if m.kept_by is not None else KVCache(zeros(m.kv_heads, m.head_dim), zeros(m.kv_heads, m.value_dim))

        caches: list[Cache] = [of(layer.mixer) for layer in self.config.layers]
        mixture = any(isinstance(layer.feed, Experts) for layer in self.config.layers)
        return caches + [ExpertsRead(jnp.zeros((), jnp.float32))] * mixture

    def __call__(
        self,
        params,
        tokens: jax.Array,
        start: jax.Array,
        cache: list[Cache] | None,
        *,
        features: bool = False,
    ):
        """Score a window and write it to the cache.

        Args:
          params: parameters by name.
          tokens: [B, W] token ids; -1 only pads, behind the tokens of a row. With a cache, what a pass makes of it is not defined,
            and whether it is written to the cache neither.
          start: [B] absolute position of each row's first token.
          cache: caches of at least start + W positions, or None to attend within the window only.
          features: whether to hand up the hidden states after the last norm, from which the head reads.

        Returns:
          (logits f32 [B, W, V], updated cache or None, features [B, W, K] or None).
        """
        with self.module(params) as module:
            logits, cache, hidden = module(tokens, start, cache, self.outermost)
        return logits, cache, hidden if features else None

    @contextlib.contextmanager
    def module(self, params) -> Generator[Transformer]:
        """Hand out the layers with their parameters, to be applied in this context alone."""
        graphdef, leaves = _skeleton(self.config)
        head = params.get(HEAD, params[EMBEDDING])
        state = nnx.from_flat_state([(_path(name), nnx.Param(head if name == HEAD else params[name])) for name in leaves])
        # What is traced here sees by this context that its weights are split.
        partitioned = contextlib.nullcontext() if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        with partitioned:
            yield nnx.merge(graphdef, state)


def _in_use(tokens):
    """Return int32 [B], how many of tokens [B, W] there are up to the last that is one; -1 is none."""
    return jnp.max(jnp.where(tokens >= 0, jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)[None, :], 0), axis=1)


@functools.lru_cache(maxsize=64)
def _skeleton(config: Config):
    """Return (graph definition, abstract parameters by name) of a model of this shape."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    return graphdef, {_name(path): leaf for path, leaf in nnx.to_flat_state(state)}


def _tensor(name: str, leaf: nnx.Param, sources: dict[str, Source]) -> Tensor:
    facts = leaf.get_metadata()
    here = re.search(r"\.layers\.(\d+)\.", name)
    anywhere = name if here is None else name.replace(here[0], ".layers.*.")
    module, _, kind = anywhere.rpartition(".")
    of_module = sources.get(module, Source((module,)))
    source = sources.get(anywhere, of_module._replace(names=tuple(f"{other}.{kind}" for other in of_module.names)))
    names = source.names if here is None else tuple(other.replace("*", here[1]) for other in source.names)
    known = facts.get("axes", ()), facts.get("linear", False), (source._replace(names=names),)
    return Tensor(leaf.get_value().shape, *known, facts.get("dtype"), facts.get("experts"), facts.get("gathered", False))


def _name(path) -> str:
    return ".".join(map(str, path))


def _path(name: str):
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
