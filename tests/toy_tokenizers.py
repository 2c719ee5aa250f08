"""Tokenizers of bytes and of spaced words, and in the way of known models; ids of bytes; text streamed through a detokenizer."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS = "<eos>"


def sentencepiece(decoder):
    """Words that carry their leading space, and bytes for what is no word, as Llama's and T5's."""
    words = ["▁", "▁Hello", "▁world", "!", "▁once", "▁END", "a", "b", "c"]
    vocab = {token: i for i, token in enumerate([EOS, "<unk>", *words, *(f"<0x{i:02X}>" for i in range(256))])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, unk_token="<unk>")


DECODERS = {
    "llama": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "metaspace": lambda: decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
}


def word_pieces(prefix: str):
    """A tokenizer in the way of Llama 2: spaces as ▁, one put before a text, bytes for what is unknown, and a BOS."""
    vocab = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghi", "▁a", "▁ab"]
    inner = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocab)}, [("▁", "a"), ("▁a", "b")], unk_token="<unk>", byte_fallback=True)
    )
    if prefix == "normalizer":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    inner.decoder = decoders.Sequence(steps)
    return _with_bos(inner)


def byte_level():
    """A tokenizer in the way of Llama 3: bytes, and a BOS."""
    vocab = ["<s>", "</s>", "<|user|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġhe"]
    inner = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [("h", "e"), ("Ġ", "he")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _with_bos(inner)


def _with_bos(inner):
    names = ("<s>", "</s>", "<|user|>", "<|end|>")
    inner.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


USUAL = {"metaspace": lambda: word_pieces("metaspace"), "llama 2": lambda: word_pieces("normalizer"), "llama 3": byte_level}
TEXTS = ["he said", " a  b\n", "naïve 😀 世界 a", "ab abc\tab ", "", "#!", "he's ... no ."]


def ids_of(tokenizer, *tokens):
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    assert None not in ids
    return ids


def byte_ids(tokenizer, data):
    """The tokens of single bytes, merged nowhere."""
    return (
        ids_of(tokenizer, *(f"<0x{b:02X}>" for b in data))
        if "<0x00>" in tokenizer.vocab
        else [_byte_id(tokenizer, b) for b in data]
    )


def _byte_id(tokenizer, byte):
    """The token of one byte; GPT-2 writes unprintable bytes as characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return ids_of(tokenizer, chr(byte if byte in printable else 256 + others.index(byte)))[0]


def stream(decoder, ids, every=1):
    """Push token by token (or `every` so many), as generation does; return the pieces, the last from `finish`."""
    pieces, whole = [], len(ids) - len(ids) % every
    for n in range(0, whole, every):
        pieces.append(decoder.push(ids[n : n + every]))
        if decoder.stopped:
            break
    return [*pieces, decoder.push(ids[whole:]) + decoder.finish()]
