"""`own_text`: text that a model itself writes, which needs no data set: tokens drawn from its probabilities."""

import functools

import jax
import jax.numpy as jnp

from mlspecqd_jax.network.network import Network


@functools.partial(jax.jit, static_argnames=("network", "positions"))
def own_text(network: Network, params: dict[str, jax.Array], first: jax.Array, positions: int, key: jax.Array) -> jax.Array:
    """Return tokens int32 [B, positions]: the first ones, and after each what the model makes of it at temperature 1.

    Args:
      network: of the model.
      params: its parameters.
      first: int32 [B], such as the token that begins texts.
      positions: of each text.
      key: of jax.random.
    """

    def body(at, carry):
        tokens, cache = carry
        here = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
        logits, cache, _ = network(params, here, jnp.full(first.shape, at, jnp.int32), cache)
        drawn = jax.random.categorical(jax.random.fold_in(key, at), logits[:, 0]).astype(jnp.int32)
        return jax.lax.dynamic_update_slice_in_dim(tokens, drawn[:, None], at + 1, axis=1), cache

    tokens = jnp.zeros((len(first), positions + 1), jnp.int32).at[:, 0].set(first)
    tokens, _ = jax.lax.fori_loop(0, positions, body, (tokens, network.init_cache(params, len(first), positions)))
    return tokens[:, :positions]
