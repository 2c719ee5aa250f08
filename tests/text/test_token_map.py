"""How one tokenizer's tokens are spelled in another's: by bytes, special ones by what they are for or by name."""

import numpy as np
import pytest
import tokenizers
from refusals import refused
from tokenizers import decoders, models, pre_tokenizers, processors
from toy_tokenizers import DECODERS, EOS, byte_ids, ids_of, sentencepiece
from transformers import PreTrainedTokenizerFast

from mlspecqd_jax.text.card import Card
from mlspecqd_jax.text.token_bytes import vocabulary
from mlspecqd_jax.text.token_map import token_map

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(tokens=(), special=(), **roles):
    """A tokenizer of all bytes, of more tokens as it writes them, and of special ones; it splits nothing, and merges nothing."""
    vocab = {token: i for i, token in enumerate([*BYTES, *tokens])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def opened(tokenizer, name):
    """The tokenizer with a special token before every text, as Llama's."""
    tokenizer.add_special_tokens({"bos_token": name})
    pair = (name, tokenizer.convert_tokens_to_ids(name))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[pair])
    return tokenizer


def card(tokenizer, size=None, ends=None, chat_ends=()):
    eos = tokenizer.eos_token_id
    ends = ends if ends is not None else () if eos is None else (eos,)
    return Card("model", len(tokenizer) if size is None else size, 512, tokenizer, ends, chat_ends)


def spelling(found, *ids):
    return [found.ids[found.first[i] : found.first[i + 1]].tolist() for i in ids]


@pytest.mark.parametrize("kind", list(DECODERS))
def test_tokens_stand_for_bytes(kind):
    words, pieces = vocabulary(byte_level(["Ġw", "Ã©"], ["<s>"])), vocabulary(sentencepiece(DECODERS[kind]()))
    assert words.data[len(BYTES)] == b" w"
    assert words.data[len(BYTES) + 1] == "é".encode()
    assert set(words.data.values()) >= {bytes([b]) for b in range(256)}
    assert words.special == {"<s>": len(BYTES) + 2}
    spaced = sentencepiece(DECODERS[kind]())
    assert pieces.data[ids_of(spaced, "▁world")[0]] == b" world"
    assert pieces.data[ids_of(spaced, "<0xE9>")[0]] == b"\xe9"
    assert pieces.ids[b"a"] == ids_of(spaced, "a")[0]  # rather than its byte
    assert pieces.ids[b"d"] == ids_of(spaced, "<0x64>")[0]
    assert set(pieces.special) == {EOS, "<unk>"}


def test_added_tokens_stand_as_they_are_written():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<think> ▁é"])
    assert vocabulary(tokenizer).data[len(BYTES)] == "<think> ▁é".encode()


@pytest.mark.parametrize("kind", list(DECODERS))
def test_between_bytes_and_spaced_words(kind):
    """Both ways: one token for one, several for one, and bytes of a character that a token is a part of."""
    words, spaced = byte_level(["Ġworld", "Ġ!", "ab", "âĢ"], eos_token="</s>"), sentencepiece(DECODERS[kind]())
    to_spaced = token_map(card(words), card(spaced))
    ids = [ids_of(words, token)[0] for token in ("Ġworld", "Ġ!", "ab", "âĢ", "Ã", "</s>")]
    expected = [ids_of(spaced, *own) for own in (["▁world"], ["▁", "!"], ["a", "b"], ["<0xE2>", "<0x80>"], ["<0xC3>"], [EOS])]
    assert spelling(to_spaced, *ids) == expected
    assert to_spaced.counterpart[ids].tolist() == [expected[0][0], -1, -1, -1, expected[4][0], expected[5][0]]
    assert to_spaced.counterpart[ids_of(words, "a")] == ids_of(spaced, "a")
    back = token_map(card(spaced), card(words))
    assert spelling(back, *ids_of(spaced, "▁world", "a", "<0x61>", "▁once", EOS)) == [
        ids_of(words, "Ġworld"),
        ids_of(words, "a"),
        ids_of(words, "a"),
        ids_of(words, *"Ġonce"),
        ids_of(words, "</s>"),
    ]
    assert back.counterpart[ids_of(spaced, "a", "<0x61>", "▁", "<0x20>")].tolist() == [
        ids_of(words, "a")[0],
        -1,  # the draft means the token that a text is written with
        ids_of(words, "Ġ")[0],
        -1,
    ]


@pytest.mark.parametrize("kind", list(DECODERS))
def test_spelled_tokens_are_the_bytes_of_the_target(kind):
    """Whatever is spelled stands for the same bytes, for every token of both."""
    words, spaced = byte_level(["Ġworld", "Ġ!", "ab", "Ã©", "©Ġ"]), sentencepiece(DECODERS[kind]())
    for target, draft in ((words, spaced), (spaced, words), (words, words)):
        found, of_target, of_draft = token_map(card(target), card(draft)), vocabulary(target), vocabulary(draft)
        for i, data in of_target.data.items():
            assert b"".join(of_draft.data[own] for own in spelling(found, i)[0]) == data
        meant = [(i, own) for i, own in enumerate(found.counterpart.tolist()) if own >= 0]
        assert len({own for _, own in meant}) == len(meant) > 0
        assert all(of_target.data[i] == of_draft.data[own] for i, own in meant if i in of_target.data)
        assert found.shared == len({*of_target.data.values()} & {*of_draft.data.values()})
        assert found.tokens == len({*of_draft.data.values()})
        assert found.stretch >= 1


def test_a_renumbered_tokenizer_is_matched_token_by_token():
    tokens = ["Ġworld", "ab"]
    one, other = byte_level(tokens, ["<x>"]), byte_level(tokens[::-1], ["<y>", "<x>"])
    found = token_map(card(one), card(other))
    names = [*BYTES, *tokens, "<x>"]
    assert found.counterpart[ids_of(one, *names)].tolist() == ids_of(other, *names)
    assert (np.diff(found.first).tolist(), found.stretch, found.opening.size) == ([1] * len(one), 1.0, 0)


def test_special_tokens_go_by_what_they_are_for_then_by_name():
    target = byte_level((), ["<user>", "<tool>", "<done>"], eos_token="<end>")
    draft = byte_level(["Ġx"], ["<user>", "<other>"], eos_token="</s>")
    end, user = ids_of(draft, "</s>", "<user>")
    found = token_map(card(target, chat_ends=tuple(ids_of(target, "<done>"))), card(draft))
    ids = ids_of(target, "<user>", "<tool>", "<end>", "<done>")
    assert spelling(found, *ids) == [[user], [], [end], [end]]
    assert found.counterpart[ids].tolist() == [user, -1, end, -1]  # one of the two is what the draft's end means


@pytest.mark.parametrize(("theirs", "ours"), [(None, None), ("<s>", "<s>"), ("<b>", "<s>"), (None, "<s>"), ("<b>", None)])
def test_what_a_tokenizer_puts_before_a_text(theirs, ours):
    """It is put there once, by the target's token where the target's tokenizer puts one there too."""
    target, draft = byte_level(eos_token="</s>"), byte_level(["Ġx"], eos_token="</s>")
    target, draft = (opened(t, name) if name else t for t, name in ((target, theirs), (draft, ours)))
    found = token_map(card(target), card(draft))
    begins = [] if ours is None else ids_of(draft, ours)
    assert found.opening.tolist() == ([] if theirs else begins)
    if theirs:
        assert spelling(found, *ids_of(target, theirs)) == [begins]


def test_tokens_beyond_a_models_places_are_none():
    words = byte_level(["Ġworld", "ab"])
    found = token_map(card(words, size=300), card(words, size=257))
    assert found.first.shape == (301,)
    assert spelling(found, 256, 257, 299) == [[256], ids_of(words, "a", "b"), []]
    assert found.counterpart.shape == (300,)
    assert found.counterpart[256:259].tolist() == [256, -1, -1]


def test_vocabularies_of_other_kinds_are_refused():
    words = card(byte_level())
    plain = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    pieces = tokenizers.Tokenizer(models.WordPiece({"a": 0, "##b": 1, "<unk>": 2}, unk_token="<unk>"))
    pieces.decoder = decoders.WordPiece()
    for inner in (plain, pieces):
        with refused("which bytes their tokens stand for is known of byte-level BPE and of SentencePiece in tokenizer.json alone"):
            token_map(words, card(PreTrainedTokenizerFast(tokenizer_object=inner)))
    foreign = tokenizers.Tokenizer(models.BPE({f"▁{chr(i)}": i - 0x4E00 for i in range(0x4E00, 0x4E40)} | {"a": 64}, []))
    foreign.decoder = decoders.Metaspace()
    with refused("only 1 of the 65 tokens of the smaller one stand in the other"):
        token_map(words, card(PreTrainedTokenizerFast(tokenizer_object=foreign)))


def test_bytes_that_no_token_stands_for_leave_a_token_unspelled():
    few = tokenizers.Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2}, []))
    few.decoder = decoders.Metaspace()
    words = byte_level(["Ġab", "Ġabc"])
    found = token_map(card(words), card(PreTrainedTokenizerFast(tokenizer_object=few)))
    assert spelling(found, *ids_of(words, "Ġab", "Ġabc"), byte_ids(words, b"c")[0]) == [[0, 1, 2], [], []]
