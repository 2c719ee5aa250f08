"""The one rule by which a level judges a draft: `verify`, coupled or by rejection.

Notation: B batch, G draft_len, V vocabulary. Row g of the verifier's logits decides the token at index `position + g` of the
sequence; row G decides the bonus token. Both rules leave the output an exact sample of the verifier:

- rejection (Leviathan et al., arXiv 2211.17192, appendix A.1): accept x ~ q with probability min(1, p(x) / q(x)), else redraw from
  norm(max(p - q, 0));
- coupled (Daliri et al., arXiv 2408.07978): verifier and drafter add the same Gumbel noise, and a draft is accepted where it is the
  verifier's own choice. Temperature 0 is greedy under either.

Neither the bonus token nor an empty draft is a special case: a row without a draft has q = 0, and max(p - 0, 0) is p itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.speculation import choosing
from mlspecqd_jax.speculation.protocols import Draft
from mlspecqd_jax.speculation.settings import Sampling


class Verdict(NamedTuple):
    """What the verifier makes of a draft: tokens[r, :accepted[r] + 1] continue row r."""

    tokens: jax.Array  # int32 [B, G + 1]
    accepted: jax.Array  # int32 [B]
    probs: jax.Array | None  # f32 [B, G + 1, V], the verifier's own distributions; None under the coupled rule
    leads: jax.Array | None = None  # f32 [B, G + 1], by how much the largest of what was chosen from was ahead, if asked for


def verify(
    logits: jax.Array,
    draft: Draft,
    position: jax.Array,
    sampling: Sampling,
    depth: int = 0,
    leads: bool = False,
    one_by_one: bool = False,
) -> Verdict:
    """Accept the longest lawful prefix of a draft and choose the token after it.

    Args:
      logits: the verifier's adjusted logits, f32 [B, G + 1, V].
      draft: the tokens to judge.
      position: int32 [B], index of the first drafted token in the row's own sequence.
      sampling: the rows' settings; `sampling.rule` selects the rule.
      depth: how many levels are above the verifier, which keeps the rejection rule's noise apart between levels.
      leads: whether to hand up by how much each choice was ahead of the next.
      one_by_one: whether coupled choices are made row by row until one rejects: where rows take time, as on CPU.
    """
    t = position[:, None] + jnp.arange(logits.shape[1])[None, :]  # [B, G + 1]
    if sampling.rule == "coupled":
        verdict = _coupled(logits, draft, t, sampling, leads, one_by_one)
    else:
        verdict = _rejection(logits, draft, t, sampling, depth, leads)
    if sampling.synthetic_acceptance is None or draft.tokens.shape[1] == 0:
        return verdict
    return _synthetic(verdict, draft, t, sampling, depth)


def _coupled(logits, draft, t, sampling, leads, one_by_one):
    def choose(logits, t):
        compared = choosing.compared(logits, choosing.noise(sampling.seed, t, 0, choosing.DRAW), sampling)
        return choosing.largest(compared), choosing.lead(compared) if leads else None

    one_by_one = one_by_one and t.shape[1] > 1 and sampling.synthetic_acceptance is None
    own, ahead = _until_rejected(choose, logits, draft, t) if one_by_one else choose(logits, t)
    accepted = _prefix(draft.tokens == own[:, :-1], draft.length)
    return Verdict(own, accepted, None, ahead)


def _until_rejected(choose, logits, draft, t):
    """Return what `choose` gives of a window, row by row until no draft is accepted any further; behind that 0."""
    drafted = jnp.pad(draft.tokens, ((0, 0), (0, 1)))

    def of_row(x, w):
        return jax.lax.dynamic_slice_in_dim(x, w, 1, axis=1)

    def body(carry):
        w, found, alive = carry
        chosen = choose(of_row(logits, w), of_row(t, w))
        found = jax.tree.map(lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, w, axis=1), found, chosen)
        return w + 1, found, alive & (w < draft.length) & (of_row(drafted, w) == chosen[0])[:, 0]

    nothing = jax.tree.map(lambda x: jnp.zeros(t.shape, x.dtype), jax.eval_shape(choose, of_row(logits, 0), of_row(t, 0)))
    begin = jnp.int32(0), nothing, jnp.ones(len(t), bool)
    _, found, _ = jax.lax.while_loop(lambda carry: (carry[0] < t.shape[1]) & jnp.any(carry[2]), body, begin)
    return found


def _rejection(logits, draft, t, sampling, depth, leads):
    p = choosing.probabilities(logits, sampling)
    q = jnp.pad(draft.probs, ((0, 0), (0, 1), (0, 0)))
    g = jnp.arange(logits.shape[1])[None, :]
    q = jnp.where((g < draft.length[:, None])[..., None], q, 0)

    def of_drafted(x):  # [B, G + 1, V] -> [B, G]
        return jnp.take_along_axis(x[:, :-1], draft.tokens[..., None], axis=-1)[..., 0]

    coins = choosing.uniform(choosing.noise(sampling.seed, t[:, :-1], depth, choosing.COIN))
    accepted = _prefix(coins * of_drafted(q) < of_drafted(p), draft.length)

    def at_end(x):  # the row after the accepted prefix: [B, G + 1, V] -> [B, 1, V]
        return jnp.take_along_axis(x, accepted[:, None, None], axis=1)

    p_end = at_end(p)
    residual = jnp.maximum(p_end - at_end(q), 0)
    residual = jnp.where(jnp.sum(residual, axis=-1, keepdims=True) > 0, residual, p_end)
    keys = choosing.noise(sampling.seed, jnp.take_along_axis(t, accepted[:, None], axis=1), depth, choosing.RESIDUAL)
    drawn = jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda r: choosing.largest(jnp.log(r) + choosing.gumbel(keys, r.shape[-1])),
        choosing.largest,
        residual,
    )
    tokens = jnp.where(g < accepted[:, None], jnp.pad(draft.tokens, ((0, 0), (0, 1))), drawn)
    return Verdict(tokens, accepted, p, choosing.lead(jnp.log(p)) if leads else None)


def _synthetic(verdict, draft, t, sampling, depth):
    """Let coins decide: the same work and the same shapes, at a token acceptance that a benchmark chooses."""
    coins = choosing.uniform(choosing.noise(sampling.seed, t[:, :-1], depth, choosing.COIN))
    accepted = _prefix(coins < sampling.synthetic_acceptance[depth], draft.length)
    drafted = jnp.arange(t.shape[1])[None, :] < accepted[:, None]
    tokens = jnp.where(drafted, jnp.pad(draft.tokens, ((0, 0), (0, 1))), verdict.tokens)
    return verdict._replace(tokens=tokens, accepted=accepted)


def _prefix(matches: jax.Array, length: jax.Array) -> jax.Array:
    """Return the length [B] of the leading run of True in matches [B, G], at most `length`."""
    matches &= jnp.arange(matches.shape[1])[None, :] < length[:, None]
    return jnp.sum(jnp.cumprod(matches.astype(jnp.int32), axis=1), axis=1)
