"""What the recursion asks of those that score, draft and control, and what they hand each other.

Notation: B batch, S slots of a buffer or a cache, W window, G draft_len, V vocabulary, F features, D levels that draft.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.fingerprints import UnknownError
from mlspecqd_jax.speculation.settings import Sampling

PADDING = -1  # the token id of a window's row that nothing is known of, or that nobody asks for


class Scored(NamedTuple):
    """What one pass of a scorer gives; a plain tuple of the same will do."""

    logits: jax.Array  # f32 [B, W, V]
    cache: Any
    features: jax.Array | None = None  # [B, W, F], such as hidden states, where they were asked for


class Scorer(Protocol):
    """A pure, hashable scoring function of parameters.

    Law 2: logits[:, w] depend on the tokens at absolute positions up to start + w alone, as fed in this call and, below start, as
    last fed in earlier ones. Entries of the cache beyond them, other rows, and rows of `PADDING` change nothing. The latter come
    last in a window, and nobody reads their logits and features.

    One whose cache does not hold all positions has a `reach`: how many at the end of what was fed may be fed again (C15). It may be
    told that it is the outermost, and is then `of_a_draft` the same scorer as a twin on its cache.
    """

    @property
    def vocab_size(self) -> int:
        """V."""

    def row_multiple(self, params: Any) -> int:
        """Return the number of rows at whose multiples a window's rows are computed alike, bit for bit; 1 where always.

        Raises:
          InputError: no number is known; one sentence on what to change.
        """

    def init_cache(self, params: Any, batch: int, slots: int) -> Any:
        """Return an empty cache of `slots` positions."""

    def __call__(self, params: Any, tokens: jax.Array, start: jax.Array, cache: Any, *, features: bool = False) -> "Scored | tuple":
        """Feed tokens [B, W] at positions start[r] + 0..W-1; hand up features if they are asked for."""


def depends_of(scorer: Scorer, params: Any) -> Any:
    """Return what a scorer's programs depend on beside their arguments, and make known to XLA what they call.

    Raises:
      UnknownError: it does not say.
    """
    depends = getattr(scorer, "depends", None)
    if depends is None:
        raise UnknownError(f"{type(scorer).__name__} has no depends")
    return depends(params)


def experts_read(scorer: Scorer, cache: Any) -> jax.Array | None:
    """Return of how many experts a layer has read the weights in all passes over a cache, f32 [], where a scorer tells.

    It does so by a method `experts_read(cache)`, which may return None; others have no experts, or none that anybody counts.
    """
    tells = getattr(scorer, "experts_read", None)
    return None if tells is None else tells(cache)


class Sequences(NamedTuple):
    """Left-aligned rows of tokens."""

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]


class Draft(NamedTuple):
    """Proposed tokens; each was drawn from exactly the distribution handed up with it (the drafter's law)."""

    tokens: jax.Array  # int32 [B, G]
    probs: jax.Array | None  # f32 [B, G, V]; None under the coupled rule
    length: jax.Array  # int32 [B], how many of the G are proposed
    classes: jax.Array | None = None  # int32 [B, G], of `guide`, where its drafter is guided and has an opinion of its tokens
    source: jax.Array | int = 1  # int32 [], LOOKUP or MODEL of `guide`

    @staticmethod
    def empty(batch: int, sampling: Sampling) -> "Draft":
        """Return the draft of no tokens: verifying it is plain decoding."""
        probs = jnp.zeros((batch, 0, sampling.vocab_size)) if sampling.rule == "rejection" else None
        return Draft(jnp.zeros((batch, 0), jnp.int32), probs, jnp.zeros((batch,), jnp.int32))

    @staticmethod
    def certain(tokens: jax.Array, length: jax.Array, sampling: Sampling) -> "Draft":
        """Return the draft of a drafter that is certain of each of its tokens [B, G]: its distributions are one-hot."""
        probs = jax.nn.one_hot(tokens, sampling.vocab_size, dtype=jnp.float32) if sampling.rule == "rejection" else None
        return Draft(tokens, probs, length)


class Lent(NamedTuple):
    """What a verifier lends its drafter for a round, and gets back."""

    cache: Any  # the verifier's own, for drafters that share it
    features: jax.Array | None  # of the verifier's last pass, [B, W, F], where its drafter uses them
    start: jax.Array  # int32 [B], the position of the first of these


class Ask(NamedTuple):
    """What a verifier asks of its drafter in one round."""

    sequences: Sequences  # what is committed so far, and drafted by the levels above
    wanted: jax.Array  # int32 [B], how many tokens are of use this round, at most draft_len
    limits: jax.Array  # int32 [D, B], how many tokens each level below the drafter may draft a round, outermost first
    lent: Lent
    draft_len: int  # static, G
    # Static: how many levels above the drafter there are. A cache of its own may lack as many tokens before the pending one, since
    # each of them may have appended one that the drafter never ran.
    depth: int
    # int32 [B], how many leading positions the verifier's cache holds; its pass feeds what follows them. A drafter that shares its
    # cache feeds the same and must not write below.
    fed: jax.Array
    refeed: int  # static, how many tokens before the pending one these lack at most
    guide: Any = None  # of `guide`, what drafts are worth; None is to draft all that is wanted


class Drafter(Protocol):
    """A pytree that proposes what comes next.

    Law 1: each proposed token was drawn from exactly the distribution handed up with it.
    Law 3: it is fed what its verifier is fed of a prompt; what is appended later it finds in what it is asked.
    """

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def must_follow(self) -> bool:
        """Whether it, or what drafts for it, is asked in every round, also where none of its tokens is of use."""

    @property
    def uses_features(self) -> bool:
        """Whether its verifier is to lend it the features of its passes."""

    def init(self, batch: int, slots: int) -> Any:
        """Return the drafter's state before anything is fed, for rows of at most `slots` tokens."""

    def feed(self, state: Any, tokens: jax.Array, start: jax.Array, lent: Lent) -> Any:
        """Return the state after a piece of the prompts: tokens [B, W] at positions start[r] + 0..W-1, `PADDING` where none."""

    def propose(self, state: Any, ask: Ask, sampling: Sampling) -> tuple[Draft, Any, Lent]:
        """Propose up to ask.wanted[r] tokens a row, drawn as the rows' settings say; return (draft, state, what was lent).

        The only noise is a function of the settings' seeds, of positions, depths and purposes.
        """


class Control(Protocol):
    """A pytree that says how many tokens each level may draft now; with its state in the loop's carry, as a step size control.

    Contract C12: pure, and a function of what was committed. Under the coupled rule no text depends on it; under the rejection
    rule it is part of what a seed means.
    """

    def init(self, draft_lens: tuple[int, ...], batch: int) -> Any:
        """Return the state before the first round, given the draft_len of every drafter, outermost first."""

    def limits(self, state: Any) -> jax.Array:
        """Return int32 [D, B]: how many tokens every drafter, outermost first, may draft for each row a round."""

    def guide(self, state: Any, left: jax.Array) -> Any:
        """Return the `Guide` of the target's drafter in this round, or None; `left` int32 [B] is how many tokens rows lack."""

    def update(self, state: Any, counts: tuple) -> Any:
        """Return the state after a round, or after several plain ones (`Guide.rest`), given the `Counts` of all levels."""


def check_proposal(proposal: Any, drafter: Drafter, ask: Ask, sampling: Sampling) -> tuple[Draft, Any, Lent]:
    """Return what a drafter returned, or raise an InputError that says how it is not what it was asked for."""
    name, form = f"{type(drafter).__name__}.propose", "(Draft, state, Lent)"
    if not isinstance(proposal, tuple) or len(proposal) != 3 or not isinstance(proposal[0], Draft):
        raise InputError(f"{name} returned {_listed(proposal)}, but must return {form}")
    if not isinstance(proposal[2], Lent):
        raise InputError(f"{name} returned {type(proposal[2]).__name__} last, but must return {form}: hand ask.lent back")
    batch = sampling.temperature.shape[0]
    wanted = {"tokens": ((batch, ask.draft_len), jnp.int32), "length": ((batch,), jnp.int32)}
    if sampling.rule == "rejection":
        wanted["probs"] = ((batch, ask.draft_len, sampling.vocab_size), jnp.float32)
    for field, (shape, dtype) in wanted.items():
        _check_array(f"{name} returned {field}", getattr(proposal[0], field), shape, dtype)
    return proposal


def check_scored(scored: Any, scorer: Scorer, tokens: jax.Array, features: bool) -> Scored:
    """Return what a scorer returned for a window, tokens [B, W], or raise an InputError that says how it is not `Scored`."""
    name = type(scorer).__name__
    if not isinstance(scored, tuple) or len(scored) != 3:
        raise InputError(f"{name} returned {_listed(scored)}, but must return Scored(logits, cache, features)")
    scored = Scored(*scored)
    width = scored.logits.shape[-1] if getattr(scored.logits, "ndim", 0) == 3 else scorer.vocab_size
    _check_array(f"{name} returned logits", scored.logits, (*tokens.shape, width), jnp.float32)
    if features and getattr(scored.features, "shape", ())[:2] != tokens.shape:
        given = _described(scored.features)
        raise InputError(f"{name} returned features {given}, but its drafter uses features: return {[*tokens.shape, 'F']}")
    return scored


def check_limits(limits: Any, control: Control, drafters: int, batch: int) -> jax.Array:
    """Return a control's limits, or raise an InputError that says how they are not int32 [D, B]."""
    _check_array(f"{type(control).__name__}.limits returned", limits, (drafters, batch), jnp.int32)
    return limits


def _check_array(what: str, found: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if getattr(found, "shape", None) != shape or found.dtype != dtype:
        raise InputError(f"{what} {_described(found)}, but must return {dtype.__name__} {list(shape)}")


def _listed(value: Any) -> str:
    return f"({', '.join(type(part).__name__ for part in value)})" if type(value) is tuple else type(value).__name__


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
