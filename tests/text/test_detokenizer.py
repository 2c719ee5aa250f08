"""Text as it comes: no character is cut, and however often one looks, it is one text."""

import hypothesis
import pytest
from hypothesis import strategies as st
from toy_tokenizers import EOS, TEXTS, byte_ids, ids_of, stream

from mlspecqd_jax.text.detokenizer import Detokenizer

TEXT = 'naïve 😀 "quoted"\n\t你好,世界 👩‍👩‍👧 é\u0301 ﷽  end '


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_pieces_join_to_the_text_and_never_cut_a_character(byte_level, every):
    ids = byte_ids(byte_level, TEXT.encode())
    assert len(ids) > len(TEXT) + 20
    decoder = Detokenizer(byte_level, byte_level("def f():")["input_ids"])
    pieces = stream(decoder, ids, every)
    assert "".join(pieces) == decoder.text == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > len(ids) / every / 4  # it does come in pieces


def test_an_emoji_comes_with_its_last_byte(byte_level):
    decoder = Detokenizer(byte_level, byte_level("x")["input_ids"])
    assert stream(decoder, byte_ids(byte_level, "a😀b".encode())) == ["a", "", "", "", "😀", "b", ""]


def test_invalid_bytes_are_shown_when_nothing_can_complete_them(byte_level):
    decoder = Detokenizer(byte_level, byte_level("x")["input_ids"])
    assert stream(decoder, byte_ids(byte_level, b"a\xf0\x9f")) == ["a", "", "", "\ufffd"]
    decoder = Detokenizer(byte_level, byte_level("x")["input_ids"])
    assert stream(decoder, byte_ids(byte_level, b"a\xf0\x9fb")) == ["a", "", "", "\ufffdb", ""]


def test_characters_of_byte_tokens_among_words(spaced):
    decoder = Detokenizer(spaced, ids_of(spaced, "▁Hello"))
    ids = [*ids_of(spaced, "▁world"), *byte_ids(spaced, "世界".encode()), *ids_of(spaced, "!")]
    pieces = stream(decoder, ids)
    assert "".join(pieces) == " world世界!"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_leading_space_is_kept(spaced, byte_level):
    decoder = Detokenizer(spaced, ids_of(spaced, "▁once"))
    assert stream(decoder, ids_of(spaced, "▁Hello", "▁world", "!")) == [" Hello", " world", "!", ""]
    prompt = ids_of(spaced, *["▁once"] * 40)  # longer than what is decoded along
    assert stream(Detokenizer(spaced, prompt), ids_of(spaced, "▁Hello")) == [" Hello", ""]
    assert stream(Detokenizer(spaced, ids_of(spaced, EOS)), ids_of(spaced, "▁Hello")) == ["Hello", ""]  # a text begins here
    words = byte_level("hello")["input_ids"], ids_of(byte_level, "Ġwo")
    assert stream(Detokenizer(byte_level, words[0]), words[1]) == [" wo", ""]


@pytest.mark.parametrize("length", range(5, 12))
def test_a_prompt_cut_within_a_character_hides_nothing(spaced, byte_level, length):
    """The context begins within a character (7 to 11: 16 tokens back), or the prompt ends within one."""
    for tokenizer in (spaced, byte_level):
        prompt = ids_of(tokenizer, "a") + byte_ids(tokenizer, ("世" * length).encode())
        new = byte_ids(tokenizer, "界!".encode())
        assert "".join(stream(Detokenizer(tokenizer, prompt), new)) == "界!"
        for begun in (1, 2):  # bytes of the new character that the prompt has already
            assert "".join(stream(Detokenizer(tokenizer, prompt + new[:begun]), new[begun:])) == "界!"


def test_special_tokens_are_left_out(byte_level):
    ids = [*byte_level("hello")["input_ids"], byte_level.eos_token_id]
    assert "".join(stream(Detokenizer(byte_level, byte_level("x")["input_ids"]), ids)) == "hello"


def ids_strategy(tokenizer):
    """Tokens as a broken model would put them out: stray bytes above all."""
    data = [0xE4, 0xB8, 0x96, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xED, 0xA0, 0xFF, 0x20, 0x41]
    others = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"), *range(3, 11)]
    return st.lists(st.one_of(st.sampled_from(byte_ids(tokenizer, data)), st.sampled_from(others)), max_size=12)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_whatever_bytes_come_and_however_often_one_looks_the_text_is_one(any_tokenizer, data):
    prompt, ids = data.draw(ids_strategy(any_tokenizer)), data.draw(ids_strategy(any_tokenizer))
    stop = data.draw(st.sampled_from([(), ("\ufffd\ufffd",), ("<|im_end|>A", "é"), ("A ",)]))
    whole = Detokenizer(any_tokenizer, prompt, stop)
    text = whole.push(ids) + whole.finish()
    assert text == whole.text
    for every in (1, 2, 5):
        decoder = Detokenizer(any_tokenizer, prompt, stop)
        assert "".join(stream(decoder, ids, every)) == text
        assert (decoder.stopped, decoder.tokens) == (whole.stopped, whole.tokens)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.binary(max_size=12))
def test_bytes_become_the_characters_that_utf_8_makes_of_them(any_tokenizer, data):
    """After a prompt that ends in a whole character; of bytes that are none, U+FFFD as Unicode recommends."""
    decoder = Detokenizer(any_tokenizer, byte_ids(any_tokenizer, b"x"))
    assert "".join(stream(decoder, byte_ids(any_tokenizer, data))) == data.decode(errors="replace")


def test_stray_bytes_are_not_held_back(any_tokenizer):
    decoder = Detokenizer(any_tokenizer, byte_ids(any_tokenizer, b"x"))
    ids = byte_ids(any_tokenizer, b"\x96\xe4\xe4\xb8\xff\xf0\x9f\x98\xf0")
    pieces = [decoder.push([id_]) for id_ in ids]
    assert pieces == ["\ufffd", "", "\ufffd", "", "\ufffd\ufffd", "", "", "", "\ufffd"]
    assert decoder.finish() == "\ufffd"


def test_what_a_prompt_leaves_of_a_character_is_not_repeated(any_tokenizer):
    """The prompt's own text shows it."""
    world = "世".encode()
    for begun in (1, 2):
        prompt = byte_ids(any_tokenizer, b"x" + world[:begun])
        assert stream(Detokenizer(any_tokenizer, prompt), byte_ids(any_tokenizer, b"A")) == ["A", ""]
        assert stream(Detokenizer(any_tokenizer, prompt), byte_ids(any_tokenizer, b"\xffA")) == ["\ufffd", "A", ""]
        assert stream(Detokenizer(any_tokenizer, prompt), []) == [""]
        assert stream(Detokenizer(any_tokenizer, prompt), [any_tokenizer.eos_token_id]) == ["", ""]
        assert "".join(stream(Detokenizer(any_tokenizer, prompt), byte_ids(any_tokenizer, world[begun:]))) == "世"
    prompt = byte_ids(any_tokenizer, b"x" + world[:1])
    assert "".join(stream(Detokenizer(any_tokenizer, prompt), byte_ids(any_tokenizer, world[1:2] + b"A"))) == "\ufffdA"


def test_what_a_push_decodes_does_not_grow_with_the_text(any_tokenizer, monkeypatch):
    decode, decoded = any_tokenizer.decode, []

    def counted(ids, **options):
        decoded.append(len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(any_tokenizer, "decode", counted)
    decoder = Detokenizer(any_tokenizer, byte_ids(any_tokenizer, b"x" * 500), ["never there"])
    decoded.clear()
    for id_ in byte_ids(any_tokenizer, TEXT.encode()) * 20:
        decoder.push([id_])
        assert sum(decoded) < 8
        decoded.clear()
    decoder.finish()
    assert sum(decoded) < 8
    assert decoder.text == TEXT * 20


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_whole_tokens_give_the_text_that_the_tokenizer_gives_at_once(any_tokenizer, data):
    tokens = st.lists(st.sampled_from([any_tokenizer.eos_token_id, *range(3, 11)]), min_size=1, max_size=8)
    prompt, ids = data.draw(tokens), data.draw(tokens)
    shown, whole = (any_tokenizer.decode(row, skip_special_tokens=True) for row in (prompt, prompt + ids))
    assert shown + "".join(stream(Detokenizer(any_tokenizer, prompt), ids)) == whole


@pytest.mark.parametrize("text", [*TEXTS, TEXT])
def test_a_text_streams_as_its_tokenizer_decodes_it(usual_tokenizer, text):
    """From its own tokens, words and bytes mixed, wherever it is cut between a prompt and what is new."""
    ids = usual_tokenizer(text)["input_ids"]

    def decoded(ids):
        return usual_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    for begun in range(len(ids) + 1):
        if "\ufffd" not in decoded(ids[:begun]):
            for every in (1, 3):
                pieces = stream(Detokenizer(usual_tokenizer, ids[:begun]), ids[begun:], every)
                assert decoded(ids[:begun]) + "".join(pieces) == decoded(ids)
