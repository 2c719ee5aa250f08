"""Tokenizers of bytes and of spaced words, the ids of their bytes, and text streamed through a detokenizer."""

import tokenizers
from tokenizers import decoders, models
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
