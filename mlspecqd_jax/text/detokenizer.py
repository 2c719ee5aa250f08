"""Text to token ids and back, piece by piece: multi-byte characters are never cut, stop strings end the text."""

import codecs
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlspecqd_jax.arguments import brief, is_array
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.text.chat import encode_conversations, encode_texts
from mlspecqd_jax.text.conversations import conversation, is_conversation, variables

REPLACEMENT = "\ufffd"  # what bytes that are no character decode to
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # of tokenizers with byte fallback
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# The character by which byte-level tokenizers (GPT-2's and those after it) write a byte, to that byte.
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
CHARACTER_BYTES = 4  # at most
CHARACTERS_A_TOKEN = 8  # more than texts have on average; see `_check_length`


class Token(NamedTuple):
    """What a token is, by itself."""

    text: str  # as it shows at the beginning of a text; a special token's own name
    data: bytes | None = None  # where it stands for bytes rather than for whole characters
    is_special: bool = False


class Detokenizer:
    """Turns one row's new tokens into text as they come, one after the other, so that it is the same however often one looks.

    `push` takes new tokens and returns the text that became final with them; `finish` returns the rest. Text that may still change
    is held back: the bytes of an incomplete character, and an ending that could begin a stop string. Bytes that can no longer
    become a character are U+FFFD at once. Special tokens are left out of the text, but stop strings are looked for with them in
    their places. After a stop string was found, `stopped` is True and nothing more comes; `tokens` counts what it took.
    """

    def __init__(self, tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._known: dict[int, Token] = {}  # by id
        # The token before, special ones passed over: tokenizers drop the space with which a text begins.
        self._last = next((t for t in reversed(prompt) if not self._token(t).is_special), None)
        self._bytes = self._incomplete(prompt)  # of a character whose other bytes have not come
        self._all_of_prompt = True  # whether these are the prompt's, which shows them itself if nothing completes them
        self._held: list[tuple[str, bool]] = []  # characters held back, and whether they are text (or of a special token)
        self._final: list[str] = []
        self._returned = 0  # so many entries of _final
        self.stopped = False
        self.tokens = 0  # taken so far

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that became final with these ids, the next after those pushed before."""
        for id_ in ids:
            if self.stopped:
                break
            self.tokens += 1
            self._take(id_)
        return self._piece()

    def finish(self) -> str:
        """Return what is left of the text, held-back endings included."""
        self._flush()
        self._release(len(self._held))
        return self._piece()

    @property
    def text(self) -> str:
        """The text that is final."""
        return "".join(self._final)

    def _take(self, id_):
        token = self._token(id_)
        if token.is_special:
            self._flush()
            self._add(token.text, is_text=False)
            return
        if token.data is None:
            self._flush()
            self._add(self._text_of(id_), is_text=True)
        else:
            before = self._bytes
            if self._all_of_prompt and not _continues(before, token.data[:1]):
                before = b""
            text, self._bytes = _characters(before + token.data)
            self._all_of_prompt = False
            self._add(text, is_text=True)
        self._last = id_

    def _flush(self):
        """Give an incomplete character up."""
        if not self._all_of_prompt:
            self._add(self._bytes.decode(errors="replace"), is_text=True)
        self._bytes, self._all_of_prompt = b"", False

    def _add(self, text, is_text):
        """Hold text back, then release what no stop string can begin in any more."""
        if self.stopped or not text:
            return
        self._held += [(character, is_text) for character in text]
        held = "".join(character for character, _ in self._held)
        # The one completed first, so that looking more or less often changes nothing.
        found = min(((held.find(s) + len(s), held.find(s)) for s in self._stop if s in held), default=None)
        if found is not None:
            self.stopped = True
            self._release(found[1])
            self._held.clear()
            return
        begun = max((n for s in self._stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        self._release(len(held) - begun)

    def _release(self, n):
        self._final.append("".join(character for character, is_text in self._held[:n] if is_text))
        del self._held[:n]

    def _piece(self):
        piece = "".join(self._final[self._returned :])
        self._returned = len(self._final)
        return piece

    def _text_of(self, id_):
        """Return what a token of whole characters adds to the text before it."""
        alone = self._token(id_).text
        if self._last is None:
            return alone
        before, both = self._token(self._last).text, self._show([self._last, id_])
        return both[len(before) :] if both.startswith(before) else alone

    def _token(self, id_) -> "Token":
        if id_ not in self._known:
            self._known[id_] = self._read(id_)
        return self._known[id_]

    def _read(self, id_):
        text, name = self._show([id_]), self._tokenizer.convert_ids_to_tokens(id_)
        if not text:
            special = self._show([id_], special=True)
            if special:
                return Token(special, is_special=True)
        if name is None:  # a place of a padded vocabulary
            return Token(text)
        byte = BYTE_TOKEN.fullmatch(name)
        if byte and text != name:
            return Token(text, bytes.fromhex(byte[1]))
        if REPLACEMENT in text and all(c in BYTE_OF for c in name):
            return Token(text, bytes(BYTE_OF[c] for c in name))
        return Token(text)

    def _incomplete(self, prompt) -> bytes:
        """Return the bytes of the character within which a prompt ends."""
        data = b""
        for id_ in reversed(prompt[1 - CHARACTER_BYTES :]):
            of_token = self._token(id_).data
            if of_token is None:
                break
            data = of_token + data
        return _characters(data)[1]

    def _show(self, ids, special=False):
        return self._tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def _characters(data: bytes) -> tuple[str, bytes]:
    """Return the characters of UTF-8 bytes, U+FFFD for what can become none, and the bytes that may still begin one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(data), decoder.getstate()[0]


def _continues(begun: bytes, byte: bytes) -> bool:
    """Return whether a byte goes on with, or completes, a character that was begun."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
    return begun + byte in (decoder.decode(begun + byte).encode(), decoder.getstate()[0])


def encode(card, prompts, *, chat: bool = False, chat_template_kwargs: Any = None) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
      card: the target's name, tokenizer, positions and vocabulary size.
      prompts: a text; a conversation, which is a list or tuple of messages (`conversations`); a list or tuple of texts,
        conversations and token ids (lists, tuples or integer arrays); or an integer array, a prompt a row. Anything else is
        refused, a generator too, since it need not end.
      chat: wrap each text as a user's message by the tokenizer's chat template; a conversation among the prompts implies it.
      chat_template_kwargs: a mapping of what the chat template is given beside the messages, or None.

    Raises:
      InputError: an empty prompt, one of another kind or far longer than the positions, ids outside the vocabulary, a text without
        a tokenizer, a chat without a template, or which refuses it.
    """
    if isinstance(prompts, str) or is_conversation(prompts):
        prompts = [prompts]
    if not isinstance(prompts, (list, tuple)) and not (is_array(prompts) and prompts.ndim == 2):
        raise InputError(
            f"prompts is {brief(prompts)}, but must be a text, a list of texts, a list of messages, or a list of lists of token ids"
        )
    if len(prompts) == 0:
        raise InputError("no prompt was given; give a text, a list of texts, messages, or a list of token id lists")
    talks = {i: conversation(prompt, i) for i, prompt in enumerate(prompts) if is_conversation(prompt)}
    texts = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
    for i, text in texts.items():
        _check_length(card, text, i)
    for i, messages in talks.items():
        _check_length(card, "".join(message.get("content") or "" for message in messages), i)
    given = {} if chat_template_kwargs is None else variables(chat_template_kwargs)
    if chat or talks:
        chats = dict(sorted((talks | {i: [{"role": "user", "content": text}] for i, text in texts.items()}).items()))
        found = dict(zip(chats, encode_conversations(card, chats, given, of_messages=bool(talks)), strict=True))
    elif chat_template_kwargs is not None:
        raise InputError("chat_template_kwargs is for a chat, and none was asked for; give messages, or chat=True (--chat)")
    else:
        found = dict(zip(texts, encode_texts(card, list(texts.values())), strict=True))
    rows = []
    for i, prompt in enumerate(prompts):
        ids = found[i] if i in found else _integers(prompt, i)
        if not ids:
            raise InputError(f"prompt {i} is empty (no tokens); give at least one token")
        bad = next((t for t in ids if not 0 <= t < card.vocab_size), None)
        if bad is not None:
            raise InputError(f"prompt {i} has token id {brief(bad)}, but ids go from 0 to {card.vocab_size - 1}")
        rows.append(ids)
    return rows


def _check_length(card, text, i):
    """Refuse a text far beyond the positions by its beginning, since to encode megabytes takes minutes."""
    if card.tokenizer is None:
        return
    size = CHARACTERS_A_TOKEN * card.max_positions
    while size < len(text):
        # What follows can merge with the last few tokens of a beginning alone, so twice the positions are beyond doubt.
        if len(encode_texts(card, [text[:size]])[0]) > 2 * card.max_positions:
            raise InputError(
                f"prompt {i} has {len(text)} characters, more than twice the tokens that {card.name} has positions for "
                f"({card.max_positions}); shorten the prompt"
            )
        size *= 4


def _integers(ids, i):
    needed = f"prompt {i} is {brief(ids)}, but must be a text, a list of token ids or a list of messages"
    if not isinstance(ids, (list, tuple)) and not (is_array(ids) and ids.ndim == 1):
        raise InputError(needed)
    if any(isinstance(t, (bool, np.bool_)) for t in ids):
        raise InputError(needed)
    try:
        return [operator.index(t) for t in (ids.tolist() if is_array(ids) else ids)]
    except TypeError:
        raise InputError(needed) from None
