"""A GGUF file's tokenizer, from its keys `tokenizer.ggml.*`: byte-level BPE (GPT-2's) or SentencePiece's BPE (Llama 2's)."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import printable, reason
from mlspecqd_jax.loading.gguf.pre_tokenizers import RULES
from mlspecqd_jax.loading.gguf.reader import GGUF
from mlspecqd_jax.text.card import Tokens, first_difference_of, tokens_of

PREFIX, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
NONE = (None, "none", "no_vocab")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # of token_type
ADDED = (UNKNOWN, CONTROL, USER_DEFINED)  # found in a text before it is split
SPACE = "▁"
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message


class Vocabulary(NamedTuple):
    """Tokens by id, and what is known of each."""

    tokens: list[str]
    types: list[int]
    scores: list[float]

    @property
    def ids(self) -> dict[str, int]:
        """The id of each token that text can have; those that only fill the embedding up are left out."""
        return {self.tokens[i]: i for i in self.real}

    @property
    def real(self) -> list[int]:
        """The ids that have a token, and do not only fill the embedding up."""
        pairs = zip(self.tokens, self.types, strict=True)
        return [i for i, (token, kind) in enumerate(pairs) if kind != UNUSED or not token.startswith("[PAD")]


def read_tokenizer(file: GGUF, known: Any = None):
    """Return the file's tokenizer as transformers' PreTrainedTokenizerFast, or None where it has none.

    Args:
      file: of which the keys are read.
      known: a tokenizer that is returned in its place where the tokens are the same, so that none need be made.

    Raises:
      InputError: a kind of tokenizer or a rule for splitting text that is not read, or keys that make none.
    """
    model = file.keys.get(f"{PREFIX}model")
    if model in NONE:
        return None
    if known is not None and first_difference_of(_tokens(file), tokens_of(known)) is None:
        return known
    if model not in ("gpt2", "llama"):
        raise InputError(f"{file.path}: {PREFIX}model is {brief(model)}, which is not supported; supported: gpt2, llama")
    vocabulary = _vocabulary(file)
    if len(vocabulary.ids) != len(vocabulary.real):
        raise InputError(
            f"{file.path}: a token stands twice in {PREFIX}tokens, which is not supported; use the original checkpoint"
        )
    settings: dict[str, Any] = {role: vocabulary.tokens[i] for role, name in ROLES.items() if (i := _id(file, name)) is not None}
    template = file.keys.get(TEMPLATE)
    if template is not None and not isinstance(template, str):
        raise InputError(f"{file.path}: {TEMPLATE} is {brief(template)}, but must be text; convert the model again")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # its note that torch is missing
    from transformers import PreTrainedTokenizerFast

    try:
        backend = (_byte_level if model == "gpt2" else _sentencepiece)(file, vocabulary)
        backend.add_tokens(_added(vocabulary))
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **settings)
    except (KeyboardInterrupt, SystemExit, InputError):
        raise
    except BaseException as error:  # whatever transformers and tokenizers raise, panics included, becomes one sentence
        raise InputError(f"{file.path}: its keys {PREFIX}* make no tokenizer ({reason(error)}); convert the model again") from error


def describe(file: GGUF) -> str:
    """Return the kind of a file's tokenizer."""
    model, rule = (file.keys.get(PREFIX + name) for name in ("model", "pre"))
    return "none" if model in NONE else printable(f"yes ({model}, {rule})" if model == "gpt2" else f"yes ({model})")


def end_token_ids(file: GGUF) -> list[int]:
    """Return the ids that end a text."""
    return list(dict.fromkeys(i for name in ENDS if (i := _id(file, name)) is not None))


def _id(file: GGUF, name: str) -> int | None:
    """Return the id of a special token, or None where the file has none."""
    key = f"{PREFIX}{name}_token_id"
    found = file.keys.get(key)
    if found is None or found in (-1, 2**32 - 1):
        return None
    size = len(file.keys.get(f"{PREFIX}tokens", ())) or file.tensors["token_embd.weight"].shape[0]
    if type(found) is not int or not 0 <= found < size:
        raise InputError(f"{file.path}: {key} is {brief(found)}, but must be an id below {size}; convert the model again")
    return found


def _vocabulary(file: GGUF) -> Vocabulary:
    tokens = _list(file, "tokens", str)
    size = file.tensors["token_embd.weight"].shape[0]
    if tokens is None or len(tokens) != size:
        count = "no" if tokens is None else len(tokens)
        raise InputError(f"{file.path} has {count} {PREFIX}tokens, but an embedding of {size}; convert the model again")
    types = _list(file, "token_type", int) or [NORMAL] * size
    scores = _list(file, "scores", float) or [0.0] * size
    if len(types) != size or len(scores) != size:
        raise InputError(f"{file.path} has not as many token types and scores as tokens; convert the model again")
    return Vocabulary(tokens, types, scores)


def _tokens(file: GGUF) -> Tokens:
    vocabulary = _vocabulary(file)
    added = {i for i, kind in enumerate(vocabulary.types) if kind in ADDED}
    return Tokens({i: vocabulary.tokens[i] for i in vocabulary.real}, added)


def _list(file: GGUF, name: str, kind: type) -> list | None:
    found = file.keys.get(PREFIX + name)
    if found is not None and (not isinstance(found, list) or (found and type(found[0]) is not kind)):
        raise InputError(f"{file.path}: {PREFIX}{name} is {brief(found)}, but must be a list; convert the model again")
    return found


def _flag(file: GGUF, name: str, default: bool) -> bool:
    found = file.keys.get(PREFIX + name, default)
    if not isinstance(found, bool):
        raise InputError(f"{file.path}: {PREFIX}{name} is {brief(found)}, but must be true or false; convert the model again")
    return found


def _added(vocabulary: Vocabulary) -> list:
    """Return the tokens that are found in a text before it is split."""
    from tokenizers import AddedToken

    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    return [AddedToken(token, special=kind != USER_DEFINED, normalized=False) for token, kind in pairs if kind in ADDED]


def _byte_level(file: GGUF, vocabulary: Vocabulary):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    name = file.keys.get(f"{PREFIX}pre")
    if name not in RULES:
        said = "has no key" if name is None else f"has {brief(name)} as"
        raise InputError(
            f"{file.path} {said} {PREFIX}pre, by which text is split; known are {', '.join(RULES)}; convert the model again with a "
            "current llama.cpp, or use the original checkpoint"
        )
    rule = RULES[name]
    lines = _list(file, "merges", str)
    if lines is None:
        raise InputError(f"{file.path} has no {PREFIX}merges; convert the model again")
    merges = [_merge(line) for line in lines]
    made = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=rule.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in rule.splits]
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if rule.normalize:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    ends = _template(file, vocabulary, rule.add_bos)
    made.post_processor = processors.ByteLevel(trim_offsets=False) if ends is None else ends
    return made


def _merge(line: str) -> tuple[str, str]:
    left, _, right = line[1:].partition(" ")  # a token has at least one character, which may be anything
    return line[:1] + left, right


def _sentencepiece(file: GGUF, vocabulary: Vocabulary):
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    ids, unknown = vocabulary.ids, _id(file, "unknown")
    if unknown is None:
        unknown = next((i for i, kind in enumerate(vocabulary.types) if kind == UNKNOWN), None)
    unk_token = None if unknown is None else vocabulary.tokens[unknown]
    merges = _merges(vocabulary, ids)
    made = Tokenizer(models.BPE(ids, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    replace, prefix = normalizers.Replace(" ", SPACE), _flag(file, "add_space_prefix", True)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    made.post_processor = _template(file, vocabulary, True) or processors.TemplateProcessing("$A", "$A $B:1")
    return made


def _merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that make a token, the best first: by its score, as SentencePiece merges."""
    found = []
    for token, kind, score in zip(*vocabulary, strict=True):
        if kind in (NORMAL, USER_DEFINED):
            pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
            found += [(score, *pair) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _template(file: GGUF, vocabulary: Vocabulary, add_bos: bool):
    """Return what puts the tokens of begin and end around a text, or None where the file asks for neither."""
    from tokenizers import processors

    wanted = {"bos": _flag(file, "add_bos_token", add_bos), "eos": _flag(file, "add_eos_token", False)}
    ends = {name: i for name, on in wanted.items() if on and (i := _id(file, name)) is not None}
    if not ends:
        return None
    bos, eos = ([vocabulary.tokens[ends[name]]] if name in ends else [] for name in ("bos", "eos"))
    single, second = ([f"{piece}:{i}" for piece in [*bos, f"${'AB'[i]}", *eos]] for i in (0, 1))
    special: Sequence[tuple[str, int]] = [(vocabulary.tokens[i], i) for i in ends.values()]
    return processors.TemplateProcessing(single=single, pair=single + second, special_tokens=special)
