"""What the recursion asks of those that score and those that draft, and what they hand each other.

Notation: B batch, S buffer length, W window, G draft_len, V vocabulary.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.speculation.settings import Sampling


class Scorer(Protocol):
    """A pure, hashable scoring function of parameters.

    Law 2: logits[:, w] depend on the tokens at absolute positions up to start + w alone, as fed in this call and, below start, as
    last fed in earlier ones. Entries of the cache beyond them, and other rows, change nothing.
    """

    vocab_size: int

    def init_cache(self, batch: int, length: int, params: Any) -> Any:
        """Return an empty cache of `length` positions."""

    def __call__(self, params: Any, tokens: jax.Array, start: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Feed tokens [B, W] at positions start[r] + 0..W-1; return (logits f32 [B, W, V], cache)."""


class Sequences(NamedTuple):
    """Left-aligned rows of tokens."""

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]


class Draft(NamedTuple):
    """Proposed tokens; each was drawn from exactly the distribution handed up with it (the drafter's law)."""

    tokens: jax.Array  # int32 [B, G]
    probs: jax.Array | None  # f32 [B, G, V]; None under the coupled rule
    length: jax.Array  # int32 [B], how many of the G are proposed

    @staticmethod
    def empty(batch: int, vocab_size: int) -> "Draft":
        """Return the draft of no tokens: verifying it is plain decoding."""
        return Draft(jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0, vocab_size)), jnp.zeros((batch,), jnp.int32))

    @staticmethod
    def certain(tokens: jax.Array, length: jax.Array, sampling: Sampling) -> "Draft":
        """Return the draft of a drafter that is certain of each of its tokens [B, G]: its distributions are one-hot."""
        probs = jax.nn.one_hot(tokens, sampling.vocab_size, dtype=jnp.float32) if sampling.rule == "rejection" else None
        return Draft(tokens, probs, length)


class Drafter(Protocol):
    """A pytree that proposes what comes next.

    Law 1: each proposed token was drawn from exactly the distribution handed up with it.
    """

    must_follow: bool  # here or in what drafts for it: then it is asked in every round, to be fed what was appended above

    def init(self, prompts: Sequences, prefill_width: int) -> Any:
        """Return the drafter's state, a cache of its own fed with all prompt tokens but the last."""

    def propose(
        self,
        state: Any,
        cache: Any,
        sequences: Sequences,
        sampling: Sampling,
        draft_len: int,
        wanted: jax.Array,
        depth: int,
        refeed: int,
    ) -> tuple[Draft, Any, Any]:
        """Propose up to wanted[r] <= draft_len tokens a row; return (draft, state, the verifier's cache).

        Args:
          state: the drafter's own state.
          cache: the verifier's cache, handed down for drafters that share it and handed back.
          sequences: what is committed so far, and drafted by the levels above.
          sampling: the rows' settings; the only noise is a function of its seeds, positions, levels and purposes.
          draft_len: static maximum G.
          wanted: int32 [B], how many tokens are of use this round.
          depth: how many levels above it there are. A cache of its own may lack as many tokens before the pending one, since
            each level above may have appended one that this drafter never ran.
          refeed: how many tokens before the pending one the verifier feeds again this round. A drafter that shares its cache
            feeds these and must not write below them.
        """


def check_draft(draft: Any, drafter: Drafter, draft_len: int, sampling: Sampling) -> Draft:
    """Return what a drafter proposed, or raise an InputError that says how it is not the `Draft` that was asked for."""
    name = type(drafter).__name__
    if not isinstance(draft, Draft):
        raise InputError(f"{name}.propose returned {type(draft).__name__} first, but must return (Draft, state, cache)")
    batch = sampling.temperature.shape[0]
    wanted = {"tokens": ((batch, draft_len), jnp.int32), "length": ((batch,), jnp.int32)}
    if sampling.rule == "rejection":
        wanted["probs"] = ((batch, draft_len, sampling.vocab_size), jnp.float32)
    for field, (shape, dtype) in wanted.items():
        found = getattr(draft, field)
        if getattr(found, "shape", None) != shape or found.dtype != dtype:
            raise InputError(f"{name}.propose returned {field} {_described(found)}, but must return {dtype.__name__} {list(shape)}")
    return draft


def check_logits(logits: Any, scorer: Scorer, tokens: jax.Array) -> None:
    """Raise an InputError unless a scorer returned logits for every position of its window, tokens [B, W]."""
    if getattr(logits, "shape", ())[:2] != tokens.shape or logits.ndim != 3 or logits.dtype != jnp.float32:
        wanted = f"float32 {[*tokens.shape, scorer.vocab_size]}"
        raise InputError(f"{type(scorer).__name__} returned logits {_described(logits)}, but must return {wanted}")


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
