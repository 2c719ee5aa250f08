"""Text as it comes: no character is cut, stop strings end it wherever tokens fall, and prompts are checked."""

import types

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlspecqd_jax.text.detokenizer import Detokenizer, encode

EOS = "<eos>"


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer of single bytes and a few merges, as GPT-2's; each byte of a longer character is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "w"), ("Ġw", "o"), ("h", "e"), ("l", "l"), ("Ġ", "Ġ")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS)


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


@pytest.fixture(scope="module", params=list(DECODERS))
def spaced(request):
    return sentencepiece(DECODERS[request.param]())


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


def card(tokenizer=None, vocab_size=300):
    return types.SimpleNamespace(name="tiny", tokenizer=tokenizer, vocab_size=vocab_size, max_positions=1000)


def test_prompts_become_ids(byte_level):
    hello = byte_level("hello")["input_ids"]
    assert encode(card(byte_level), "hello") == [hello]
    assert encode(card(byte_level), ["hello", [1, 2]]) == [hello, [1, 2]]
    assert encode(card(), [[5, 299], [0]]) == [[5, 299], [0]]
    assert encode(card(), np.array([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert encode(card(), [jnp.array([1, 2])]) == [[1, 2]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt was given"),
        ("", r"prompt 0 is empty \(no tokens\); give at least one token"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, 300]], "prompt 0 has token id 300, but ids go from 0 to 299"),
        ([[1], [-1]], "prompt 1 has token id -1"),
        ([1, 2], "prompt 0 is 1, but must be a text or a list of token ids"),
        ([None], "prompt 0 is None"),
        ("caf\udce9", "is not valid Unicode; give UTF-8 text"),
        ([[1.5]], r"prompt 0 is \[1.5\], but must be"),
        ([["1"]], r"prompt 0 is \['1'\], but must be"),
    ],
)
def test_bad_prompts_are_refused(byte_level, prompts, message):
    with pytest.raises(ValueError, match=message):
        encode(card(byte_level), prompts)


def test_a_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match=r"tiny has no tokenizer; .* or give token ids"):
        encode(card(), "hello")


def test_a_tokenizer_with_more_ids_than_the_model_is_noticed(byte_level):
    with pytest.raises(ValueError, match=r"prompt 0 has token id \d+, but ids go from 0 to 9"):
        encode(card(byte_level, vocab_size=10), "hello")


def test_chat_needs_a_template(byte_level):
    with pytest.raises(ValueError, match="tiny has no chat template"):
        encode(card(byte_level), "hello", chat=True)


def test_chat_wraps_each_text_by_the_template(byte_level):
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
    byte_level.chat_template = template
    try:
        rows = encode(card(byte_level), ["hello", "😀"], chat=True)
        plain = encode(card(byte_level), "hello")
    finally:
        byte_level.chat_template = None
    assert [byte_level.decode(row) for row in rows] == ["user:hello\nbot:", "user:😀\nbot:"]
    assert byte_level.decode(plain[0]) == "hello"


@pytest.fixture(scope="module", params=["byte level", "llama", "metaspace"])
def any_tokenizer(request, byte_level):
    """Each kind of tokenizer, with two special tokens."""
    tokenizer = byte_level if request.param == "byte level" else sentencepiece(DECODERS[request.param]())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


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


def test_a_prompt_far_beyond_the_positions_is_refused_by_its_beginning(byte_level):
    encoded = []

    class Counting:
        def __call__(self, text, **options):
            encoded.append(len(text))
            return byte_level(text, **options)

    short = types.SimpleNamespace(name="tiny", tokenizer=Counting(), vocab_size=300, max_positions=10)
    with pytest.raises(ValueError, match=r"prompt 1 has 10000000 characters, more than twice the tokens that tiny has positions"):
        encode(short, ["a", "a" * 10**7])
    assert sum(encoded) < 1000
    spaces = [len(ids) for ids in encode(short, ["a" * 25])]  # which of these are too long is said with the new tokens
    assert spaces == [25]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"prompt": "a"}, r"prompts is \{'prompt': 'a'\}, but must be a text, a list of texts"),
        (b"bytes", r"prompts is b'bytes'"),
        ({"a", "b"}, "prompts is {"),
        (7, "prompts is 7"),
        (None, "prompts is None"),
        ((text for text in ["a"]), "prompts is of type generator"),
        (np.zeros((2, 3, 4), int), r"prompts is an array of int64 of shape \[2, 3, 4\]"),
        (np.zeros((1, 2)), r"prompt 0 is an array of float64 of shape \[2\], but must be a text or a list of token ids"),
        ([b"bytes"], r"prompt 0 is b'bytes'"),
        ([{"a": 1}], r"prompt 0 is \{'a': 1\}"),
        ([{1, 2}], r"prompt 0 is \{1, 2\}"),
        ([["a", "b"]], r"prompt 0 is \['a', 'b'\]"),
        ([[True]], r"prompt 0 is \[True\]"),
        ([[10**5000]], r"prompt 0 has token id of type int, but ids go from 0"),
    ],
)
def test_prompts_of_another_kind_are_refused_by_name_and_not_iterated(byte_level, prompts, message):
    with pytest.raises(ValueError, match=message):
        encode(card(byte_level), prompts)


def test_ids_may_be_lists_tuples_and_arrays(byte_level):
    for prompts in ([[1, 2]], ([1, 2],), ((1, 2),), [np.array([1, 2], np.uint8)], np.array([[1, 2]]), jnp.array([[1, 2]])):
        assert encode(card(), prompts) == [[1, 2]]
    assert encode(card(byte_level), ("hello",)) == encode(card(byte_level), "hello")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_whole_tokens_give_the_text_that_the_tokenizer_gives_at_once(any_tokenizer, data):
    tokens = st.lists(st.sampled_from([any_tokenizer.eos_token_id, *range(3, 11)]), min_size=1, max_size=8)
    prompt, ids = data.draw(tokens), data.draw(tokens)
    shown, whole = (any_tokenizer.decode(row, skip_special_tokens=True) for row in (prompt, prompt + ids))
    assert shown + "".join(stream(Detokenizer(any_tokenizer, prompt), ids)) == whole
