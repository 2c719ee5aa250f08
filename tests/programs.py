"""The generation program of a three-level stack, compiled for chips that are not here."""

import dataclasses
import functools

import chips
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from tiny import shape

from mlspecqd_jax.network.config import Config
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.pass_times import guessed
from mlspecqd_jax.programs import ONE_ALGORITHM
from mlspecqd_jax.speculation import loop
from mlspecqd_jax.speculation.autopilot import Autopilot
from mlspecqd_jax.speculation.drafters.either import Either
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.priors import prior
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.weights.placement import cache_sharding, weight_sharding
from mlspecqd_jax.weights.products import array_specs
from mlspecqd_jax.weights.quantization import quantize_params
from pallas_kernels import named

LLAMA_8B = shape(128256, 4096, 14336, 32, 32, 8, 128, 131072)
LLAMA_3B = shape(128256, 3072, 8192, 28, 24, 8, 128, 131072, tie_word_embeddings=True)
LLAMA_1B = shape(128256, 2048, 8192, 16, 32, 8, 64, 131072, tie_word_embeddings=True)
QWEN25_7B = shape(152064, 3584, 18944, 28, 28, 4, 128, 32768, "qwen2")
QWEN3_06B = shape(151936, 1024, 3072, 28, 16, 8, 128, 40960, "qwen3", tie_word_embeddings=True)


def plain(config: Config, mesh, dtype=jnp.bfloat16):
    """Return the parameters of a model, by name, as they would lie on a mesh."""
    return {
        name: jax.ShapeDtypeStruct(tensor.shape, dtype, sharding=weight_sharding(tensor.axes, tensor.shape, mesh))
        for name, tensor in Network(config).tensors().items()
    }


def twin(config: Config, mesh, dtype=jnp.bfloat16):
    """Return the parameters of its MXFP4 twin, arranged for the mesh."""
    params = plain(config, mesh, dtype)
    cast = functools.partial(quantize_params, tensors=Network(config).tensors(), mesh=mesh, dtype=dtype)
    leaves = jax.eval_shape(cast, params)

    def placed(name, leaf):
        if name in params and leaf.shape == params[name].shape and not hasattr(leaf, "arrays"):
            return params[name]
        return on_mesh(leaf, mesh)

    return {name: placed(name, leaf) for name, leaf in leaves.items()}


def on_mesh(leaf, mesh):
    """Return an arranged leaf's arrays where its spec says that they lie."""
    specs = array_specs(named(leaf.product).axes, leaf.spec, leaf.core)
    arrays = {
        role: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, specs[role]))
        for role, array in leaf.arrays.items()
    }
    return dataclasses.replace(leaf, arrays=arrays)


def compile_stack(mesh, target: Config, small: Config, batch: int, size: int, dtype=jnp.bfloat16):
    """Compile `advance` of target > its twin on the same cache > a small model's twin on a cache of its own."""
    networks = [Network(config, mesh) for config in (target, small)]
    innermost = Level(networks[1], twin(small, mesh, dtype))
    middle = Level(networks[0], twin(target, mesh, dtype), innermost, 3, share_cache=True)
    return compiled(mesh, Level(networks[0], plain(target, mesh, dtype), middle, 7, window_multiple=16), target, batch, size)


def compile_guided(mesh, target: Config, small: Config, batch: int, size: int, widths: tuple[int, ...]):
    """Compile `advance` of the same, drafts as long as pays by models or look-up, with windows of other widths at each level.

    None is so wide that scores of attention look like a cache.
    """
    networks = [Network(config, mesh) for config in (target, small)]
    innermost = Either(Level(networks[1], twin(small, mesh)))
    middle = Level(networks[0], twin(target, mesh), innermost, 7, widths=widths, share_cache=True)
    stack = Level(networks[0], plain(target, mesh), Either(middle), 23, window_multiple=8, widths=(8,))
    control = Autopilot.create(guessed([4, 1, 1], "tpu"), prior([True, False, False]), 2)
    return compiled(mesh, stack, target, batch, size, control=control)


def compile_twin(mesh, target: Config, draft_len: int, batch: int, size: int):
    """Compile `advance` of target > its twin, or of the target alone where draft_len is 0, as an exact stack on GPU."""
    network = Network(target, mesh)
    below = Level(network, twin(target, mesh), share_cache=True) if draft_len else None
    stack = Level(network, plain(target, mesh), below, draft_len, window_multiple=16)
    return compiled(mesh, stack, target, batch, size, compiler_options=ONE_ALGORITHM)


def compiled(mesh, stack: Level, target: Config, batch: int, size: int, control=None, **options):
    """Compile `advance` of a stack, its caches split over the mesh."""
    sampling = jax.eval_shape(lambda: Sampling.create(batch, target.vocab_size))
    tokens, row = jax.ShapeDtypeStruct((batch, size), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)

    def placed(leaf):
        if leaf.ndim != 4:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cache_sharding(leaf.shape, mesh))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.tree.map(placed, jax.eval_shape(functools.partial(loop.init, control=control), stack, tokens, row, sampling))
    rounds = jax.ShapeDtypeStruct((), jnp.int32)
    return chips.compile_for(mesh, loop.advance, stack, state, row, sampling, rounds, donate_argnums=1, **options)
