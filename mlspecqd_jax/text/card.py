"""`Card`: what belongs to a model beside its weights, and where the tokenizers of two differ."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Card:
    """What belongs to a model beside its weights; hashable, so that it can be static under jit.

    Cards are compared without names and tokenizers, which no compiled program reads: a model that is loaded again, under whatever
    name, runs the programs that its first load compiled.
    """

    name: str = dataclasses.field(compare=False)
    vocab_size: int
    max_positions: int
    tokenizer: Any = dataclasses.field(compare=False)  # a `FastTokenizer`, a tokenizer of transformers, or None
    eos_token_ids: tuple[int, ...]
    chat_end_token_ids: tuple[int, ...] = ()  # what ends an assistant's turn in a chat, beside the above


def first_difference(one: Card, other: Card) -> tuple[int, str | None, str | None] | None:
    """Return (id, token of the one, token of the other) at the least id on which two tokenizers disagree, or None.

    Special tokens that only one of them has, and vocabularies padded to different sizes, are no difference: the other model never
    chooses them. Models without a tokenizer agree with any.
    """
    if one.tokenizer is None or other.tokenizer is None or one.tokenizer is other.tokenizer:
        return None
    return first_difference_of(tokens_of(one.tokenizer), tokens_of(other.tokenizer))


class Tokens(NamedTuple):
    """What the ids of a tokenizer stand for."""

    by_id: Mapping[int, str]
    added: Collection[int]  # those that are found in a text before it is split


def tokens_of(tokenizer: Any) -> Tokens:
    """Return the tokens of one of transformers' tokenizers."""
    return Tokens({i: token for token, i in tokenizer.get_vocab().items()}, set(tokenizer.get_added_vocab().values()))


def first_difference_of(one: Tokens, other: Tokens) -> tuple[int, str | None, str | None] | None:
    """Return `first_difference` of two tokenizers by their tokens."""
    for i in sorted(one.by_id.keys() | other.by_id.keys()):
        a, b = one.by_id.get(i), other.by_id.get(i)
        extra = (a is None and i in other.added) or (b is None and i in one.added)
        if a != b and not extra:
            return i, a, b
    return None
