"""Logits to adjusted logits to a choice: noise, penalties, temperature and filters, in the order of transformers.

Notation: B batch, W positions of a window, S buffer length, V vocabulary. `position[r, w]` is the index, in row r's own sequence,
of the token that logits[r, w] decide; the tokens before that index are the ones that count for penalties.

`lax.cond` skips what no row asks for, so that a greedy batch costs one argmax. Filters find their thresholds by bisection over the
ordered bits of a float instead of sorting the vocabulary: 32 passes over V, seven (top_p) to twenty (top_k) times faster than a
sort of 8 x 151,936 logits on CPU.
"""

import jax
import jax.numpy as jnp

from mlspecqd_jax.folds import ordered_logsumexp, ordered_softmax
from mlspecqd_jax.speculation.settings import Sampling

# Purposes of a draw; each has noise of its own under the rejection rule.
DRAW, COIN, RESIDUAL = 0, 1, 2


def noise(seed: jax.Array, t: jax.Array, level: int, purpose: int) -> jax.Array:
    """Return the keys [B, W] of the only randomness there is.

    Args:
      seed: uint32 [B].
      t: int32 [B, W], index of the token being drawn in the row's own sequence (prompt counted, padding not).
      level: number of the level that draws; constant under the coupled rule.
      purpose: DRAW, COIN or RESIDUAL; constant under the coupled rule.
    """

    def one(seed, t):
        key = jax.random.key(seed, impl="threefry2x32")
        for data in (t, level, purpose):
            key = jax.random.fold_in(key, data)
        return key

    return jax.vmap(jax.vmap(one, (None, 0)))(seed, t)


def gumbel(keys: jax.Array, vocab_size: int) -> jax.Array:
    """Return standard Gumbel noise f32 [B, W, V], so that argmax(log p + noise) is a draw from p."""
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,), jnp.float32)))(keys)


def uniform(keys: jax.Array) -> jax.Array:
    """Return uniform noise f32 [B, W] in [0, 1)."""
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32)))(keys)


def adjust(logits: jax.Array, tokens: jax.Array, position: jax.Array, sampling: Sampling) -> jax.Array:
    """Add the logit bias, then apply the repetition, presence and frequency penalties.

    The repetition penalty is that of Keskar et al. (arXiv 1909.05858) over prompt and new tokens, as in transformers; presence
    and frequency penalties are subtracted for new tokens only, as in the OpenAI API and vLLM.

    Args:
      logits: f32 [B, W, V].
      tokens: int32 [B, S], drafted tokens in place.
      position: int32 [B, W].
      sampling: the rows' settings.

    Returns:
      f32 [B, W, V].
    """
    if sampling.logit_bias is not None:
        logits = logits + sampling.logit_bias[:, None, :]
    s = sampling
    wanted = jnp.any((s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0))
    return jax.lax.cond(wanted, lambda x: _penalize(x, tokens, position, s), lambda x: x, logits)


def _penalize(logits, tokens, position, s: Sampling):
    vocab = logits.shape[-1]
    slots = jnp.arange(tokens.shape[1])

    def counts(tokens, counted):  # [S], bool [S] -> int32 [V]
        return jnp.zeros((vocab,), jnp.int32).at[tokens].add(counted.astype(jnp.int32))

    def one(logits, tokens, position, begin, repetition, presence, frequency):
        seen = counts(tokens, slots < position) > 0
        new = counts(tokens, (slots >= begin) & (slots < position))
        repeated = jnp.where(logits < 0, logits * repetition, logits / repetition)
        logits = jnp.where(seen, repeated, logits)
        return logits - frequency * new.astype(jnp.float32) - presence * (new > 0).astype(jnp.float32)

    window = jax.vmap(one, (0, None, 0, None, None, None, None))
    return jax.vmap(window)(
        logits, tokens, position, s.prompt_length, s.repetition_penalty, s.presence_penalty, s.frequency_penalty
    )


def draw(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """argmax(filtered logits + Gumbel noise), or argmax(logits) where a row's temperature is 0.

    Args:
      logits: adjusted f32 [B, W, V].
      keys: noise keys [B, W].

    Returns:
      int32 [B, W], an exact draw from softmax(filtered logits) of each row.
    """
    return largest(compared(logits, keys, sampling))


def compared(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Return what `draw` takes the largest of, f32 [B, W, V]."""
    greedy = (sampling.temperature == 0)[:, None, None]

    def drawn(x):
        return jnp.where(greedy, x, filtered(x, sampling) + gumbel(keys, x.shape[-1]))

    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda x: x, logits)


def largest(x: jax.Array) -> jax.Array:
    """argmax(x [..., V]), int32 [...]: the first of the largest, and NaN before any number.

    As a maximum and where it stands first: XLA:CPU takes two to five times as long for an argmax, which it does one by one.
    """
    found = (x == jnp.max(x, axis=-1, keepdims=True)) | jnp.isnan(x)
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.min(jnp.where(found, place, x.shape[-1] - 1), axis=-1)


def lead(x: jax.Array) -> jax.Array:
    """Return by how much the largest of x [..., V] exceeds the next, f32 [...]; infinity where nothing else is left."""
    best = jnp.max(x, axis=-1, keepdims=True)
    alone = jnp.sum((x == best).astype(jnp.int32), axis=-1) == 1
    next_ = jnp.max(jnp.where(x == best, -jnp.inf, x), axis=-1)
    return jnp.where(alone, best[..., 0] - next_, 0.0)


def probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """softmax(filtered logits), or one-hot at the first argmax where a row's temperature is 0; f32 [B, W, V]."""
    one_hot = jax.nn.one_hot(largest(logits), logits.shape[-1], dtype=jnp.float32)

    def soft(x):
        greedy = (sampling.temperature == 0)[:, None, None]
        return jnp.where(greedy, one_hot, jax.nn.softmax(filtered(x, sampling), axis=-1))

    return jax.lax.cond(jnp.any(sampling.temperature > 0), soft, lambda x: one_hot, logits)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Divide by the temperature, then set what top_k, top_p and min_p leave out to -inf (in that order, as transformers does).

    Rows of temperature 0 pass through as at temperature 1; their caller takes the argmax.
    """
    s = sampling
    temperature = jnp.where(s.temperature > 0, s.temperature, 1.0)[:, None, None]
    x = logits / temperature
    x = jax.lax.cond(jnp.any(s.top_k > 0), lambda x: _keep_top_k(x, s.top_k), lambda x: x, x)
    x = jax.lax.cond(jnp.any(s.top_p < 1), lambda x: _keep_top_p(x, s.top_p), lambda x: x, x)
    return jax.lax.cond(jnp.any(s.min_p > 0), lambda x: _keep_min_p(x, s.min_p), lambda x: x, x)


def _keep_top_k(x, top_k):
    """Keep the k largest entries and every tie of the smallest of them."""
    k = jnp.where(top_k > 0, jnp.minimum(top_k, x.shape[-1]), x.shape[-1])[:, None]
    order = _ordered_bits(x)
    threshold = _largest(lambda t: jnp.sum(order >= t[..., None], axis=-1) >= k, x.shape[:-1])
    return jnp.where(order >= threshold[..., None], x, -jnp.inf)


def _keep_top_p(x, top_p):
    """Drop the smallest entries whose mass stays within 1 - top_p; of equal entries those of lower index go first."""
    # Sums of these are exact in f32, up to a million entries, so that no order of additions changes the choice: multiples of 2^-23
    # whose sum is less than 2, and multiples of 2^-28, each at most 2^-24, whose sum is at most 2^-4.
    p = ordered_softmax(x)
    coarse = jnp.rint(p * 2.0**23) * 2.0**-23
    fine = jnp.rint((p - coarse) * 2.0**28) * 2.0**-28
    p = coarse + fine
    order = _ordered_bits(x)
    spare = jnp.where(top_p < 1, 1 - top_p, -1.0)[:, None]  # [B, 1]; -1 drops nothing

    def mass_below(t):
        below = order < t[..., None]
        return sum(jnp.sum(jnp.where(below, part, 0), axis=-1) for part in (coarse, fine))

    boundary = _largest(lambda t: mass_below(t) <= spare, x.shape[:-1])
    boundary = jnp.minimum(boundary, jnp.max(order, axis=-1))  # rounding of a sum must not drop the largest
    tied = order == boundary[..., None]
    each = jnp.max(jnp.where(tied, p, 0), axis=-1)
    dropped = jnp.floor((spare - mass_below(boundary)) / jnp.maximum(each, jnp.finfo(jnp.float32).tiny))
    dropped = jnp.clip(dropped, 0, jnp.sum(tied, axis=-1).astype(jnp.float32) - 1)
    rank = jnp.cumsum(tied, axis=-1).astype(jnp.float32)  # 1-based among the ties
    keep = (order > boundary[..., None]) | (tied & (rank > dropped[..., None]))
    return jnp.where(keep | (spare < 0)[..., None], x, -jnp.inf)


def _keep_min_p(x, min_p):
    """Drop entries less probable than min_p times the most probable one."""
    return jnp.where(x < jnp.max(x, axis=-1, keepdims=True) + jnp.log(min_p)[:, None, None], -jnp.inf, x)


def _ordered_bits(x):
    """Map f32 to uint32 so that the order is kept; -0 and 0 map to one value."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = jnp.where(bits == jnp.uint32(1 << 31), 0, bits)  # in integers: XLA folds an x + 0.0 away
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds, shape):
    """Return the largest uint32 t at which `holds(t)`, given that it holds at 0 and, once false, stays false."""

    def try_bit(i, t):
        candidate = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, t)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(shape, jnp.uint32))


def log_probability(logits: jax.Array, chosen: jax.Array) -> jax.Array:
    """log_softmax(logits)[chosen], f32 [B, W], from logits f32 [B, W, V] and token ids [B, W]."""
    picked = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    return picked - ordered_logsumexp(logits)
