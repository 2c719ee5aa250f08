"""Stop strings end the text wherever tokens fall."""

import pytest
from toy_tokenizers import byte_ids, ids_of, stream

from mlspecqd_jax.text.detokenizer import Detokenizer


def stopped_stream(tokenizer, text, stop, every=1):
    """Stream single bytes until a stop string; return (pieces, decoder, ids)."""
    ids = byte_ids(tokenizer, text.encode())
    decoder = Detokenizer(tokenizer, tokenizer("x")["input_ids"], [stop] if isinstance(stop, str) else stop)
    return stream(decoder, ids, every), decoder, ids


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_a_stop_string_ends_the_text_across_tokens(byte_level, every):
    text = "one two END three"
    pieces, decoder, _ = stopped_stream(byte_level, text.ljust(100), "END", every)
    assert decoder.stopped
    assert "".join(pieces) == decoder.text == "one two "
    assert decoder.tokens == len("one two END")


def test_what_may_begin_a_stop_string_is_held_back_then_released(byte_level):
    pieces, decoder, _ = stopped_stream(byte_level, "a aab aac", "aac")
    assert pieces == ["", "a ", "", "", "aab", " ", "", "", "", ""]
    assert decoder.stopped
    pieces, decoder, _ = stopped_stream(byte_level, "xaaa", "aac")
    assert pieces == ["x", "", "", "a", "aa"]
    assert not decoder.stopped
    pieces, decoder, _ = stopped_stream(byte_level, "abababac!", "abac")
    assert "".join(pieces) == "abab"
    assert decoder.stopped


@pytest.mark.parametrize("every", [1, 3, 100])
def test_the_stop_string_completed_first_wins_however_often_one_looks(byte_level, every):
    text = "so abcdef".ljust(100)
    for stops, kept in ((["cd", "f"], "so ab"), (["f", "cd"], "so ab"), (["abcde", "cd"], "so ab"), (["bcd", "d"], "so a")):
        pieces, decoder, _ = stopped_stream(byte_level, text, stops, every)
        assert "".join(pieces) == kept
        assert decoder.tokens == text.index("d") + 1


def test_a_stop_string_with_a_character_of_several_tokens(byte_level):
    pieces, decoder, _ = stopped_stream(byte_level, "tea 中文 is good", "a 中文")
    assert "".join(pieces) == "te"
    assert decoder.stopped
    assert decoder.tokens == len("tea 中文".encode())
    pieces, decoder, _ = stopped_stream(byte_level, "tea 中国", "a 中文")
    assert "".join(pieces) == "tea 中国"
    assert not decoder.stopped


@pytest.mark.parametrize("every", [1, 2, 7, 100])
def test_tokens_to_a_stop_string_among_byte_tokens(spaced, every):
    """A run of byte tokens shows as one: incomplete at its end, it hides the stop string that it holds."""
    text = "一二三四五六七八九十"
    ids = byte_ids(spaced, text.encode())
    for n, stop in enumerate(text, start=1):
        decoder = Detokenizer(spaced, ids_of(spaced, "a"), [stop])
        assert "".join(stream(decoder, ids, every)) == text[: n - 1]
        assert decoder.tokens == 3 * n


def test_a_stop_string_within_a_token(byte_level):
    ids = ids_of(byte_level, "he", "ll", "Ġwo")
    decoder = Detokenizer(byte_level, byte_level("x")["input_ids"], ["l w"])
    assert "".join(stream(decoder, ids)) == "hel"
    assert decoder.tokens == 3


def test_without_a_stop_string_all_tokens_count(byte_level):
    _, decoder, ids = stopped_stream(byte_level, "hello", "xyz")
    assert decoder.tokens == len(ids) == 5


def test_a_stop_string_in_the_prompt_does_not_count(byte_level):
    decoder = Detokenizer(byte_level, byte_level("END EN")["input_ids"], ["END"])
    assert "".join(stream(decoder, byte_ids(byte_level, b"D of it"))) == "D of it"


def test_a_stop_string_may_be_or_hold_a_special_token(any_tokenizer):
    a, b, end = [*byte_ids(any_tokenizer, b"AB"), any_tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for stop, ids, text, taken in [
        ("<|im_end|>", [a, end, b], "A", 2),
        ("A<|im_end|>", [b, a, end, b], "B", 3),
        ("<|im_end|>B", [a, end, a, end, b, b], "AA", 5),
        ("<|im_end|><|im_end|>", [a, end, b, end, end, b], "AB", 5),
        ("im_", [a, end, b], "A", 2),
        ("BB", [a, end, b, end, b], "ABB", 5),  # what stands between is no text, and keeps them apart
    ]:
        decoder = Detokenizer(any_tokenizer, [a], [stop])
        assert "".join(stream(decoder, ids)) == text, stop
        assert (decoder.tokens, decoder.stopped) == (taken, stop != "BB")
