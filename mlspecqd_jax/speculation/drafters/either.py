"""Look-up or a level, whichever is worth more in this round: the drafter of a level that is guided.

Notation: B batch, G draft_len.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup
from mlspecqd_jax.speculation.guide import LOOKUP, MODEL, best_length, chances, surviving, undrafted
from mlspecqd_jax.speculation.protocols import Ask, Draft, Lent
from mlspecqd_jax.speculation.settings import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Either:
    """A `Drafter`: what look-up finds, or what a level drafts, one of them for all rows of a round, or neither.

    Without a guide the level drafts for the rows for which look-up finds nothing.
    """

    level: Any  # a `Level`
    lookup: PromptLookup = dataclasses.field(default_factory=PromptLookup)

    @property
    def name(self) -> str:
        """Return the names of both."""
        return f"{self.level.name} | {self.lookup.name}"

    @property
    def must_follow(self) -> bool:
        """Return whether the level is asked in every round."""
        return self.level.must_follow

    @property
    def uses_features(self) -> bool:
        """Return whether the level's drafter uses features."""
        return self.level.uses_features

    def init(self, batch: int, slots: int) -> Any:
        """Return the level's state; look-up has none."""
        return self.level.init(batch, slots)

    def feed(self, state: Any, tokens: jax.Array, start: jax.Array, lent: Lent) -> Any:
        """Feed the level."""
        return self.level.feed(state, tokens, start, lent)

    def propose(self, state: Any, ask: Ask, sampling: Sampling) -> tuple[Draft, Any, Lent]:
        """Ask one of them for as many tokens as pay, and the other for none (see `Drafter`)."""
        found, _, lent = self.lookup.propose(None, ask, sampling)
        by_lookup = found.length > 0
        if ask.guide is not None:
            by_lookup = jnp.broadcast_to(~self._model_pays(state, ask, found), by_lookup.shape)
        drafted, state, lent = self.level.propose(state, ask._replace(wanted=jnp.where(by_lookup, 0, ask.wanted)), sampling)

        def either(found, drafted):
            return jnp.where(by_lookup.reshape(-1, *(1,) * (found.ndim - 1)), found, drafted)

        merged = jax.tree.map(either, found._replace(source=by_lookup), drafted._replace(source=by_lookup))
        # Where sources are told apart there is one for all rows.
        return merged._replace(source=jnp.where(by_lookup[0], LOOKUP, MODEL)), state, lent

    def _model_pays(self, state, ask, found):
        guide = ask.guide
        looked_up, _ = best_length(guide, surviving(chances(guide, LOOKUP, found.classes), found.length), 0.0)
        mean = jnp.broadcast_to(guide.mean[0, MODEL][:, None], found.tokens.shape)
        drafted, _ = best_length(guide, surviving(mean, ask.wanted), guide.each, self.level.debt(state, ask))
        return (drafted > jnp.maximum(undrafted(guide), looked_up)) | (guide.retry & (drafted > -jnp.inf))
