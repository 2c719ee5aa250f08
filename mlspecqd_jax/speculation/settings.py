"""`Sampling`: how each row's tokens are chosen, checked and broadcast to one entry a row.

Notation: B batch, V vocabulary, E stop tokens. Everything a user may vary per request is a traced [B] array.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlspecqd_jax import jax_settings
from mlspecqd_jax.arguments import ROWS, brief, choice, each_row, flag, number, sequence, whole
from mlspecqd_jax.errors import InputError

RULES = ("coupled", "rejection")
LEVELS = 64  # that judge, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, one entry a row; build it with `Sampling.create`, which checks and broadcasts."""

    temperature: jax.Array  # f32 [B]; 0 is greedy
    top_k: jax.Array  # int32 [B]; 0 is off
    top_p: jax.Array  # f32 [B]; 1 is off
    min_p: jax.Array  # f32 [B]; 0 is off
    repetition_penalty: jax.Array  # f32 [B]; 1 is off; over prompt and new tokens
    presence_penalty: jax.Array  # f32 [B]; 0 is off; over new tokens
    frequency_penalty: jax.Array  # f32 [B]; 0 is off; over new tokens
    seed: jax.Array  # uint32 [B]
    prompt_length: jax.Array  # int32 [B]; where a row's new tokens begin
    stop_token_ids: jax.Array  # int32 [E], padded with -1
    logit_bias: jax.Array | None  # f32 [B, V], or None for no bias
    synthetic_acceptance: jax.Array | None  # f32 [levels that judge], or None: coins instead of the rule, for benchmarks
    vocab_size: int = dataclasses.field(metadata={"static": True})  # V of the target, over which every level draws
    rule: str = dataclasses.field(metadata={"static": True}, default="coupled")
    logprobs: bool = dataclasses.field(metadata={"static": True}, default=False)

    @staticmethod
    @jax_settings.held
    def create(
        batch: int,
        vocab_size: int,
        *,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=0,
        rule: str = "coupled",
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None = None,
        stop_token_ids: Collection[int] = (),
        logprobs: bool = False,
        synthetic_acceptance: Sequence[float] | None = None,
    ) -> "Sampling":
        """Check every value and broadcast it to the batch.

        Args:
          batch: B.
          vocab_size: V of the target.
          seed: an int s, which means s, s + 1, ... for rows 0, 1, ...; or one int a row.
          logit_bias: token id to the number added to its logit (-inf bans it); one mapping for all rows or one a row.
          stop_token_ids: ids that end a row.
          logprobs: whether to record the log-probability of each chosen token under the model's unadjusted logits.
          synthetic_acceptance: for benchmarks: the probability at which each level, outermost first, accepts a drafted token,
            whatever it is. The output is meaningless.

        Raises:
          InputError: a value out of range, or a sequence whose length is not the batch size.
        """
        batch, vocab_size = whole("batch", batch), whole("vocab_size", vocab_size)

        def row(name: str, value, dtype: Any = np.float32):
            given = each_row(name, value, batch)
            if np.issubdtype(dtype, np.integer):  # more than there are tokens, not what is left of the bits
                given = [min(x, np.iinfo(dtype).max) for x in given]
            return jax.device_put(np.asarray(given, dtype))  # jnp.asarray compiles a program for each shape

        return Sampling(
            temperature=row("temperature", temperature),
            top_k=row("top_k", top_k, np.int32),
            top_p=row("top_p", top_p),
            min_p=row("min_p", min_p),
            repetition_penalty=row("repetition_penalty", repetition_penalty),
            presence_penalty=row("presence_penalty", presence_penalty),
            frequency_penalty=row("frequency_penalty", frequency_penalty),
            seed=_seeds(seed, batch),
            prompt_length=jax.device_put(np.zeros(batch, np.int32)),
            stop_token_ids=_stop_ids(stop_token_ids, vocab_size),
            logit_bias=_bias(logit_bias, batch, vocab_size),
            synthetic_acceptance=_rates(synthetic_acceptance),
            vocab_size=vocab_size,
            rule=choice("rule", rule, RULES),
            logprobs=flag("logprobs", logprobs),
        )

    def of_round(self, length: jax.Array) -> "Sampling":
        """Return the settings of a round that begins at `length` [B]: under rejection, with noise that no other round has.

        What was drawn beyond a rejection is thus told apart from what is drawn there later, so that the length of a draft may be
        chosen by all that went before: else a position's noise would be known before it is used. Under the coupled rule a
        position's noise is one for all rounds and levels, and what is drawn depends on no draft.
        """
        if self.rule == "coupled":
            return self

        def one(seed, length):
            return jax.random.bits(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), length), dtype=jnp.uint32)

        return dataclasses.replace(self, seed=jax.vmap(one)(self.seed, length))


def _seeds(seed, batch: int) -> jax.Array:
    given = sequence("seed", seed, ROWS)
    if given is None:
        first = number("seed", seed)
        number("seed", first + batch - 1)
        return jax.device_put(np.arange(first, first + batch, dtype=np.uint32))
    if len(given) != batch:
        raise InputError(f"seed has {len(given)} entries, but must be a whole number or one for each of {batch} rows")
    return jax.device_put(np.asarray([number("seed", s) for s in given], np.uint32))


def _stop_ids(ids: Collection[int], vocab_size: int) -> jax.Array:
    given = sequence("stop_token_ids", list(ids) if isinstance(ids, (set, frozenset)) else ids, vocab_size)
    if given is None:
        raise InputError(f"stop_token_ids is {brief(ids)}, but must be a list of token ids from 0 to {vocab_size - 1}")
    given = [number("stop_token_ids", i) for i in given]  # beyond the vocabulary some models record one, in vain
    # Padded to a multiple of 8, so that another number of ids is not another trace.
    padded = given + [-1] * (-len(given) % 8 or (0 if given else 8))
    return jax.device_put(np.asarray(padded, np.int32))


def _bias(bias, batch: int, vocab_size: int) -> jax.Array | None:
    needed = f"must be a mapping from token ids to numbers, or a list of one for each of {batch} rows"
    if bias is None:
        return None
    rows = [bias] * batch if isinstance(bias, Mapping) else bias
    if not isinstance(rows, (list, tuple)) or not all(isinstance(mapping, Mapping) for mapping in rows):
        raise InputError(f"logit_bias is {brief(bias)}, but {needed}")
    if len(rows) != batch:
        raise InputError(f"logit_bias has {len(rows)} entries, but {needed}")
    if not any(rows):
        return None
    dense = np.zeros((batch, vocab_size), np.float32)
    for r, mapping in enumerate(rows):
        for token, value in mapping.items():
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocab_size:
                raise InputError(f"logit_bias names token {brief(token)}, but must name ids from 0 to {vocab_size - 1}")
            dense[r, token] = number("logit_bias", value)
        if np.all(dense[r] == -np.inf):
            raise InputError(f"logit_bias bans every token of row {r}; leave at least one that may be chosen")
    return jnp.asarray(dense)


def _rates(rates: Sequence[float] | None) -> jax.Array | None:
    if rates is None:
        return None
    given = sequence("synthetic_acceptance", rates, LEVELS)
    given = [number("synthetic_acceptance", rate) for rate in ([rates] if given is None else given)]
    return jnp.asarray(np.asarray(given, np.float32)) if given else None
