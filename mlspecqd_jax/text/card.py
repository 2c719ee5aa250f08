"""`Card`: what belongs to a model beside its weights, and where the tokenizers of two differ."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Card:
    """What belongs to a model beside its weights; hashable, so that it can be static under jit.

    Cards are compared without names and tokenizers, which no compiled program reads: a model that is loaded again, under whatever
    name, runs the programs that its first load compiled.
    """

    name: str = dataclasses.field(compare=False)
    vocab_size: int
    max_positions: int
    tokenizer: Any = dataclasses.field(compare=False)  # a transformers tokenizer, or None
    eos_token_ids: tuple[int, ...]
    chat_end_token_ids: tuple[int, ...] = ()  # what ends an assistant's turn in a chat, beside the above


def first_difference(one: Card, other: Card) -> tuple[int, str | None, str | None] | None:
    """Return (id, token of the one, token of the other) at the least id on which two tokenizers disagree, or None.

    Special tokens that only one of them has, and vocabularies padded to different sizes, are no difference: the other model never
    chooses them. Models without a tokenizer agree with any.
    """
    if one.tokenizer is None or other.tokenizer is None or one.tokenizer is other.tokenizer:
        return None
    tokens = [{i: token for token, i in card.tokenizer.get_vocab().items()} for card in (one, other)]
    added = [set(card.tokenizer.get_added_vocab().values()) for card in (one, other)]
    for i in sorted(tokens[0].keys() | tokens[1].keys()):
        a, b = tokens[0].get(i), tokens[1].get(i)
        extra = (a is None and i in added[1]) or (b is None and i in added[0])
        if a != b and not extra:
            return i, a, b
    return None
