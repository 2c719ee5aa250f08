"""`Stack`: levels that generate, and what a caller keeps with each."""

import dataclasses
from typing import Any

import jax

from mlspecqd_jax.arguments import instance
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.speculation.level import Level


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack:
    """What generates: the outermost level, with all below it; a pytree whose leaves are their parameters."""

    level: Level
    # Whatever belongs to the model of each level, outermost first, such as its name and tokenizer; never read by a program.
    cards: tuple[Any, ...] = dataclasses.field(metadata={"static": True, "unread": True})
    # Whether every stack of this target gives the same tokens: then all windows of the target compute a row alike.
    exact: bool = dataclasses.field(metadata={"static": True})
    control: Any = None  # a `Control` of draft lengths where a caller brings none; None drafts all that may be drafted

    def __post_init__(self):
        if self.level.share_cache:
            raise InputError("the outermost level has no verifier whose cache it could share; build it with share_cache=False")
        if len(self.cards) != len(self.level.levels):
            raise InputError(f"a stack of {len(self.level.levels)} levels has {len(self.cards)} cards; give one for each")

    @property
    def levels(self) -> tuple[Level, ...]:
        """All levels, outermost first."""
        return self.level.levels

    @property
    def card(self) -> Any:
        """The target's card."""
        return self.cards[0]


def outermost(stack: Stack | Level) -> Level:
    """Return the level of a stack that generates, or raise an InputError unless there is one.

    A level alone will do: what has no name and no tokenizer needs no cards.
    """
    if isinstance(stack, Level):
        stack = Stack(stack, (None,) * len(stack.levels), exact=False)
    return instance("stack", stack, Stack, "a stack: build it with mlsd.stack(model, *drafters)").level
