"""`Fixed`: the control of draft lengths that changes nothing as it goes (contract C12).

Notation: B batch, D levels that draft.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mlspecqd_jax import jax_settings
from mlspecqd_jax.arguments import LARGEST_INT, each_row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """A `Control`: every level drafts its draft_len, and for the target at most `draft_limit` tokens a round."""

    draft_limit: jax.Array  # int32 [B]; 0 decodes the row plainly

    @staticmethod
    @jax_settings.held
    def create(batch: int, *, draft_limit=LARGEST_INT) -> "Fixed":
        """Check a limit, one number for all rows or one a row, and broadcast it to the batch; another is no other trace."""
        given = [min(limit, LARGEST_INT) for limit in each_row("draft_limit", draft_limit, batch)]
        return Fixed(jax.device_put(np.asarray(given, np.int32)))

    def init(self, draft_lens, batch):
        """Return the limits themselves (see `Control`)."""
        limits = jnp.full((len(draft_lens), batch), LARGEST_INT, jnp.int32)
        return limits.at[:1].set(self.draft_limit)

    def limits(self, state):
        """Return int32 [D, B]."""
        return state

    def guide(self, state, left):
        """Return None: drafts are as long as they may be."""

    def update(self, state, counts):
        """Return the state as it is."""
        return state
