"""`FastTokenizer`: what this package needs of a tokenizer, by `tokenizers` alone.

It answers as transformers' PreTrainedTokenizerFast of the same file and settings does, which takes a second to import. That is made
as soon as anything else is asked of it, or anything of it is changed, and from then on answers everything.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
OWN = ("_backend", "_settings", "_make", "_made")


class FastTokenizer:
    """A tokenizer of `tokenizers`, with the names of its special tokens and a chat template."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], make: Callable[[], Any]):
        """Take a tokenizer of which `is_enough` holds.

        Args:
          backend: of tokenizer.json.
          settings: what transformers' tokenizer is made with beside it.
          make: makes that.
        """
        self._backend, self._settings, self._make, self._made = backend, settings, make, None

    @property
    def whole(self) -> Any:
        """Transformers' tokenizer."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def __call__(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> Any:
        if self._made is not None or options.keys() - {"verbose"}:
            return self.whole(text, add_special_tokens=add_special_tokens, **options)
        return {"input_ids": self._backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> str:
        """Return the text of token ids."""
        if self._made is not None or clean_up_tokenization_spaces:
            options = {"clean_up_tokenization_spaces": clean_up_tokenization_spaces}
            return self.whole.decode(ids, skip_special_tokens=skip_special_tokens, **options)
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, id_: int) -> str | None:
        """Return the name of a token."""
        return self._backend.id_to_token(id_) if self._made is None else self._made.convert_ids_to_tokens(id_)

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens, added ones among them."""
        return self._backend.get_vocab(with_added_tokens=True) if self._made is None else self._made.get_vocab()

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the added tokens, ascending."""
        return {token.content: i for i, token in sorted(self.added_tokens_decoder.items())}

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """The added tokens by id."""
        return self._backend.get_added_tokens_decoder() if self._made is None else self._made.added_tokens_decoder

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a name, by it."""
        if self._made is not None:
            return self._made.special_tokens_map
        return {name: str(self._settings[name]) for name in NAMED if self._settings.get(name) is not None}

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of special tokens, those with a name first."""
        if self._made is not None:
            return self._made.all_special_ids
        tokens = (*self.special_tokens_map.values(), *map(str, self._settings.get("extra_special_tokens", ())))
        return [i for token in dict.fromkeys(tokens) if (i := self._backend.token_to_id(token)) is not None]

    @property
    def chat_template(self) -> Any:
        """The text of the template, or None."""
        return self._settings["chat_template"] if self._made is None else self._made.chat_template

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text."""
        return self._id_of("eos_token")

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """What is beneath."""
        return self._backend if self._made is None else self._made.backend_tokenizer

    def _id_of(self, name):
        token = self.special_tokens_map.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.whole, name, value)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def __reduce__(self):
        return _as_it_is, (self.whole,)


def is_enough(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> bool:
    """Return whether transformers' tokenizer would add nothing to a file's: no token, and nothing to lengthen or shorten texts."""
    if backend.truncation is not None or backend.padding is not None:
        return False
    there = backend.get_added_tokens_decoder()
    names = {token.content for token in there.values()}
    named = {str(settings[name]) for name in NAMED if settings.get(name) is not None}
    told = settings.get("added_tokens_decoder", {})
    if not named | {str(token) for token in settings.get("extra_special_tokens", ())} <= names:
        return False
    return all(_is_told(token, there.get(i)) and (token.special or token.content not in named) for i, token in told.items())


def _is_told(token: Any, there: tokenizers.AddedToken | None) -> bool:
    """Return whether a token is added in a file as it is told beside it."""
    return isinstance(token, tokenizers.AddedToken) and all(getattr(token, f) == getattr(there, f, None) for f in FLAGS)


def _as_it_is(value):
    return value
