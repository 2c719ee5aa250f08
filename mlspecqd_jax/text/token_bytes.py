"""Which bytes each token of a tokenizer stands for: what tokenizers of different vocabularies have in common."""

import json
from typing import NamedTuple

from mlspecqd_jax.text.detokenizer import BYTE_OF, BYTE_TOKEN


class Vocabulary(NamedTuple):
    """A tokenizer's tokens, by what they stand for."""

    # By id, in the order in which a text would rather be written: tokens before the byte tokens that stand in for missing ones.
    data: dict[int, bytes]
    special: dict[str, int]  # ids by name: what no text is written with

    @property
    def ids(self) -> dict[bytes, int]:
        """By bytes, the id of the token that a text would rather be written with."""
        return {data: i for i, data in reversed(self.data.items())}


def vocabulary(tokenizer) -> Vocabulary | None:
    """Return the vocabulary of a byte-level BPE or a SentencePiece tokenizer; None of another, whose tokens stand for no bytes."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    steps = _steps(json.loads(decoder.__getstate__()))
    kinds = {step["type"] for step in steps}
    space = next((mark for step in steps if (mark := _space(step)) is not None), None)
    if "ByteLevel" not in kinds and space is None:
        return None
    added, special_ids = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    special_ids |= {i for i, token in added.items() if token.special}
    data, single, special = {}, {}, {}
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        byte = BYTE_TOKEN.fullmatch(token) if "ByteFallback" in kinds else None
        if i in special_ids:
            special[token] = i
        elif i in added:  # found in the text as it is
            data[i] = token.encode(errors="replace")
        elif byte:
            single[i] = bytes.fromhex(byte[1])
        elif "ByteLevel" not in kinds:
            data[i] = token.replace(space, " ").encode(errors="replace")
        elif all(character in BYTE_OF for character in token):
            data[i] = bytes(BYTE_OF[character] for character in token)
    return Vocabulary({i: of_token for i, of_token in (data | single).items() if of_token}, special)


def _steps(decoder: dict) -> list[dict]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


def _space(step: dict) -> str | None:
    """Return the character by which tokens write a space, where this step of a decoder replaces it."""
    if step["type"] == "Metaspace":
        return step["replacement"]
    is_space = step["type"] == "Replace" and step["content"] == " "
    return step["pattern"].get("String") if is_space else None
