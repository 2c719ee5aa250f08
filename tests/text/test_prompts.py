"""Prompts: which ids they become, and one sentence for what is none."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from mlspecqd_jax.text.detokenizer import encode


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
        ([1, 2], "prompt 0 is 1, but must be a text, a list of token ids or a list of messages"),
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
        (
            np.zeros((1, 2)),
            r"prompt 0 is an array of float64 of shape \[2\], but must be a text, a list of token ids or a list of messages",
        ),
        ([b"bytes"], r"prompt 0 is b'bytes'"),
        ([{"a": 1}], "prompt 0, message 0 has no role"),
        ([[1], {"a": 1}], "prompt 0, message 0 is .1., but must be an object with a role"),
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
