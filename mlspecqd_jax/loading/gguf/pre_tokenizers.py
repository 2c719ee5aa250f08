"""How text is split before byte-level BPE, by the name that a GGUF file's key tokenizer.ggml.pre gives to a rule.

A rule is one or more regular expressions, applied in turn; their matches, and what lies between, are the pieces. Source:
llama.cpp's src/llama-vocab.cpp, whose comments quote the expressions of the tokenizers that the names stand for.
"""

from typing import NamedTuple

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Rule(NamedTuple):
    """How a text becomes pieces, and pieces tokens."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is that, whatever merges would make of it
    add_bos: bool = False  # where the file does not say
    normalize: bool = False  # to Unicode's NFC


_LLAMA3 = Rule((_WORDS + r"\p{N}{1,3}" + _REST,), ignore_merges=True, add_bos=True)
_QWEN2 = Rule((_WORDS + r"\p{N}" + _REST,))
_DIGITS = Rule((r"\p{N}", GPT2))
RULES = {
    "default": Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Rule((GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2._replace(normalize=True),
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "command-r": _DIGITS,
    "refact": _DIGITS,
    "tekken": Rule((_CASED,), ignore_merges=True, add_bos=True),
}
