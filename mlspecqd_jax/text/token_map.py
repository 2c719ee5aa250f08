"""How a draft of another tokenizer spells what the target's tokens stand for, and which of its own are tokens of the target.

A token of the target is spelled by the draft's token of the same bytes or, where there is none, by the longest ones that fit, from
left to right. That need not be how the draft's tokenizer would write the text, which costs acceptance alone. Special tokens stand
for no bytes: those that begin and end a text are matched by what they are for, all others by name.

Notation: V tokens of the target, N tokens of the draft that spell all of them.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.text.card import Card
from mlspecqd_jax.text.token_bytes import Vocabulary, vocabulary

# What is frequent in texts of a kind is a token in any vocabulary made from them, the smaller one's tokens first of all. Where half
# of these are none of the other's, the two were made from other texts or by other rules, and little of a draft could be proposed.
LEAST_SHARED = 0.5


class TokenMap(NamedTuple):
    """How a draft spells the target's tokens, and which of its own stand for one of them."""

    first: np.ndarray  # int32 [V + 1]; ids[first[t] : first[t + 1]] spell token t: none where the draft has nothing that means it
    ids: np.ndarray  # int32 [N], of the draft
    counterpart: np.ndarray  # int32 [V], the draft's token that means the same, named once at most, or -1
    opening: np.ndarray  # int32 [P], what the draft's tokenizer puts before a text, where the target's puts nothing
    shared: int  # how many of the draft's tokens, special ones apart, are tokens of the target
    tokens: int  # of the draft, special ones apart

    @property
    def stretch(self) -> float:
        """How many tokens of the draft spell one of the target on average, tokens that are not spelled apart."""
        return len(self.ids) / max(np.count_nonzero(np.diff(self.first)), 1)


class _Words(NamedTuple):
    """What a model's tokenizer says, as far as its vocabulary reaches."""

    vocabulary: Vocabulary
    ids: dict[bytes, int]
    opening: tuple[int, ...]  # what it puts before a text
    ends: tuple[int, ...]  # what ends a text, or a turn of a chat


def token_map(target: Card, draft: Card) -> TokenMap:
    """Return how a draft spells the target's tokens; computed once for two tokenizers.

    Raises:
      InputError: why it cannot, without a word on the two models.
    """
    given = [(card.tokenizer, card.vocab_size, (*card.eos_token_ids, *card.chat_end_token_ids)) for card in (target, draft)]
    return _map(*given)


@functools.lru_cache(maxsize=4)
def _map(target: tuple[Any, int, tuple[int, ...]], draft: tuple[Any, int, tuple[int, ...]]) -> TokenMap:
    theirs, ours = _words(*target), _words(*draft)
    shared, smaller = len(theirs.ids.keys() & ours.ids.keys()), min(len(theirs.ids), len(ours.ids))
    if not shared or shared < LEAST_SHARED * smaller:
        raise InputError(f"only {shared:,} of the {smaller:,} tokens of the smaller one stand in the other")
    longest = max(map(len, ours.ids), default=0)
    spelled = {i: tuple(_pieces(data, ours.ids, longest)) for i, data in theirs.vocabulary.data.items()}
    roles = _special(theirs, ours)
    spelled |= roles
    lengths = [len(spelled.get(i, ())) for i in range(target[1])]
    # Of several of the target's that mean the same, the draft means the first: an end, or what a text is rather written with.
    meant: dict[int, int] = {}
    for i in (*roles, *theirs.vocabulary.data):
        if len(spelled[i]) == 1:
            meant.setdefault(spelled[i][0], i)
    counterpart = np.full(target[1], -1, np.int32)
    counterpart[list(meant.values())] = list(meant)
    return TokenMap(
        first=np.cumsum([0, *lengths]).astype(np.int32),
        ids=np.array([own for i in range(target[1]) for own in spelled.get(i, ())], np.int32),
        counterpart=counterpart,
        opening=np.array(() if theirs.opening else ours.opening, np.int32),
        shared=sum(data in theirs.ids for data in ours.ids),
        tokens=len(ours.ids),
    )


def _words(tokenizer, vocab_size: int, ends: tuple[int, ...]) -> _Words:
    found = vocabulary(tokenizer)
    if found is None:
        raise InputError(
            "which bytes their tokens stand for is known of byte-level BPE and of SentencePiece in tokenizer.json alone, which "
            f"{type(tokenizer).__name__} is not"
        )
    # A model may have fewer places than its tokenizer has tokens.
    found = Vocabulary(
        {i: data for i, data in found.data.items() if i < vocab_size},
        {name: i for name, i in found.special.items() if i < vocab_size},
    )
    ids = tokenizer("", verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    ends = tuple(dict.fromkeys(i for i in (*([] if eos is None else [eos]), *ends) if i < vocab_size))
    return _Words(found, found.ids, tuple(i for i in ids if i not in ends or i == tokenizer.bos_token_id), ends)


def _special(target: _Words, draft: _Words) -> dict[int, tuple[int, ...]]:
    """Return how the target's special tokens are spelled, the most telling first."""
    end, names = draft.ends[:1], draft.vocabulary.special
    by_name = {i: (names[name],) if name in names else () for name, i in target.vocabulary.special.items()}
    openings = {i: draft.opening for i in target.opening[:1] if draft.opening}
    ends = {i: end for i in target.ends if not by_name.get(i) and i not in openings}
    return ends | openings | {i: own for i, own in by_name.items() if i not in ends and i not in openings}


def _pieces(data: bytes, ids: dict[bytes, int], longest: int) -> Iterator[int]:
    """Yield the tokens that spell bytes, each the longest that fits; none if bytes are left that no token stands for."""
    found, at = [], 0
    while at < len(data):
        sizes = range(min(longest, len(data) - at), 0, -1)
        size = next((size for size in sizes if data[at : at + size] in ids), None)
        if size is None:
            return
        found.append(ids[data[at : at + size]])
        at += size
    yield from found
