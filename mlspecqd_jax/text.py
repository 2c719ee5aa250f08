"""Text to token ids and back, piece by piece: multi-byte characters are never cut, stop strings end the text."""

import operator
from collections.abc import Sequence

from mlspecqd_jax.chat import encode_texts

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
CONTEXT = 16  # prompt tokens decoded with the first new ones, since tokenizers drop a leading space


class Decoder:
    """Turns one row's new tokens into text as they come.

    `push` takes all new ids so far and returns the text that is final since the last call; `finish` returns the rest. Text that may
    still change is held back: an incomplete character, and an ending that could begin a stop string. After a stop string was
    found, `stopped` is True and nothing more comes.
    """

    def __init__(self, tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        begin, shown = self._known(prompt)
        self._context = list(prompt[begin:])
        self._before = len(shown)
        self._text = ""  # final text so far
        self._unstopped = 0  # so many of the new tokens are known to hold no stop string
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that became final with these new ids (all of them since the prompt)."""
        text = self._new_text(ids)
        if not self.stopped:
            text = text[: len(text) - self._held_back(text)]
        return self._emit(text)

    def finish(self, ids: Sequence[int]) -> str:
        """Return what is left of the text, held-back endings included."""
        return self._emit(self._new_text(ids))

    @property
    def text(self) -> str:
        """The text returned so far."""
        return self._text

    def tokens_to_stop(self, ids: Sequence[int]) -> int:
        """Return how many of the ids it took to complete the first stop string (all of them where there is none)."""
        counts = range(self._unstopped, len(ids))
        return next((n for n in counts if self._first_stop(self._decode(ids[:n])) is not None), len(ids))

    def _new_text(self, ids):
        text = self._decode(ids)
        stop = self._first_stop(text)
        self.stopped = stop is not None
        if stop is None and not text.endswith(REPLACEMENT):  # an incomplete character may hide what came before it
            self._unstopped = len(ids)
        return text if stop is None else text[:stop]

    def _first_stop(self, text):
        """Return where the stop string completed first begins, so that looking more or less often changes nothing."""
        found = min(((text.find(s) + len(s), text.find(s)) for s in self._stop if s in text), default=None)
        return None if found is None else found[1]

    def _emit(self, text):
        piece = text[len(self._text) :]
        self._text += piece
        return piece

    def _known(self, prompt):
        """Return where the context begins and what it shows, in whole characters: one that the prompt only begins is new text."""
        ends = [max(len(prompt) - n, 0) for n in range(4)]  # a character has up to four byte tokens
        spans = [(max(len(prompt) - CONTEXT - n, 0), end) for end in ends for n in range(4)]
        shown = [(begin, self._show(prompt[begin:end])) for begin, end in spans]
        whole = (known for known in shown if REPLACEMENT not in (known[1][:1], known[1][-1:]))
        return next(whole, shown[0])

    def _decode(self, ids):
        return self._show(self._context + list(ids))[self._before :]

    def _show(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _held_back(self, text):
        whole = text.rstrip(REPLACEMENT)
        begun = [n for s in self._stop for n in range(1, len(s)) if whole.endswith(s[:n])]
        return len(text) - len(whole) + max(begun, default=0)


def encode(card, prompts, *, chat: bool = False) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
      card: the target's name, tokenizer and vocabulary size.
      prompts: a text, a list of texts, or a list of lists of token ids.
      chat: wrap each text as a user's message by the tokenizer's chat template.

    Raises:
      ValueError: an empty prompt, ids outside the vocabulary, a text without a tokenizer, chat without a template.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts = list(prompts)
    if not prompts:
        raise ValueError("no prompt was given; give a text, a list of texts or a list of token id lists")
    rows, encoded = [], iter(encode_texts(card, [prompt for prompt in prompts if isinstance(prompt, str)], chat=chat))
    for i, prompt in enumerate(prompts):
        ids = next(encoded) if isinstance(prompt, str) else _integers(prompt, i)
        if not ids:
            raise ValueError(f"prompt {i} is empty (no tokens); give at least one token")
        bad = next((t for t in ids if not 0 <= t < card.vocab_size), None)
        if bad is not None:
            raise ValueError(f"prompt {i} has token id {bad}, but ids go from 0 to {card.vocab_size - 1}")
        rows.append(ids)
    return rows


def _integers(ids, i):
    try:
        return [operator.index(t) for t in ids]
    except TypeError:
        raise ValueError(f"prompt {i} is {ids!r}, but must be a text or a list of token ids") from None
