"""Where a text ends: limits, stop tokens, stop strings, the end of a turn, the last position."""

import dataclasses

import pytest
from short_prompts import IDS, NEW, PROMPTS

import mlspecqd_jax as mlsd
from mlspecqd_jax import requests

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def test_a_limit_for_each_row(stack):
    out = mlsd.generate(stack, PROMPTS, max_new_tokens=[3, 1, 7], stop_token_ids=[])
    assert [len(t) for t in out.tokens] == [3, 1, 7]
    assert out.finish_reason == ["length"] * 3


def test_stop_token_ids_end_the_row_and_are_kept(stack):
    free = mlsd.generate(stack, PROMPTS, max_new_tokens=NEW, stop_token_ids=[])
    stop = free.tokens[0][5]
    out = mlsd.generate(stack, PROMPTS, max_new_tokens=NEW, stop_token_ids=[stop])
    for row, everything in zip(out.tokens, free.tokens, strict=True):
        end = everything.index(stop) + 1 if stop in everything else NEW
        assert row == everything[:end]


@pytest.mark.parametrize("offset", [0, 1, 5, 17, 18])
def test_a_stop_string_ends_the_text_before_it(stack, offset):
    free = mlsd.generate(stack, PROMPTS[2], max_new_tokens=NEW, stop_token_ids=[])
    text = free.text[0]
    stop = text[offset : offset + 6]
    out = mlsd.generate(stack, PROMPTS[2], max_new_tokens=NEW, stop_token_ids=[], stop=stop)
    assert out.text[0] == text[: text.index(stop)]
    assert out.finish_reason == ["stop"]
    assert out.tokens[0] == free.tokens[0][: len(out.tokens[0])]
    streamed = mlsd.stream(stack, PROMPTS[2], max_new_tokens=NEW, stop_token_ids=[], stop=[stop, "never there"])
    assert "".join(streamed) == out.text[0]
    assert streamed.generation.tokens == out.tokens


@pytest.mark.slow
def test_positions_limit_the_text(demo, stack):
    positions = demo.card.max_positions
    ids = [[5] * (positions - 3)]
    assert len(mlsd.generate(stack, ids, stop_token_ids=[]).tokens[0]) == 3  # the default is clipped
    with pytest.raises(ValueError, match=rf"{positions - 3} prompt tokens and 4 new tokens exceed the {positions} positions"):
        mlsd.generate(stack, ids, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"needs one for a new token; shorten the prompt"):
        mlsd.generate(stack, [[5] * positions])


def test_a_chat_ends_at_the_templates_end_of_turn_too(demo, monkeypatch):
    monkeypatch.setattr(demo.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    eos = demo.card.eos_token_ids
    stack = mlsd.stack(dataclasses.replace(demo, card=dataclasses.replace(demo.card, chat_end_token_ids=(7, *eos))))

    def stops(**arguments):
        return [i for i in requests.request(stack, "x", arguments)[1].stop_token_ids.tolist() if i >= 0]

    assert stops() == list(eos)
    assert stops(chat=True) == [*eos, 7]
    assert stops(chat=True, stop_token_ids=[9]) == [9]
    assert stops(chat=True, stop_token_ids=()) == []


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer of single letters and one special token."""

    special: int

    def decode(self, ids, skip_special_tokens, **_):
        return "".join(chr(0x4E00 + i) if i != self.special else "" if skip_special_tokens else "<|end|>" for i in ids)

    def convert_ids_to_tokens(self, id_):
        return "<|end|>" if id_ == self.special else chr(0x4E00 + id_)


@pytest.mark.slow
def test_a_stop_string_may_be_a_special_token(small):
    stack = mlsd.stack(small)
    free = mlsd.generate(stack, IDS[:1], max_new_tokens=NEW, stop_token_ids=[]).tokens[0]
    end = next(i for i in range(3, NEW) if free[i] not in free[:i])
    card = dataclasses.replace(small.card, tokenizer=Letters(free[end]))
    told = mlsd.stack(dataclasses.replace(small, card=card))
    letters = "".join(chr(0x4E00 + i) for i in free[:end])
    arguments = {"max_new_tokens": NEW, "stop_token_ids": []}
    for stop, text in (("<|end|>", letters), (letters[-1] + "<|end|>", letters[:-1])):
        out = mlsd.generate(told, IDS[:1], stop=[stop, "never"], **arguments)
        assert (out.text, out.tokens, out.finish_reason) == ([text], [free[: end + 1]], ["stop"])
        assert "".join(mlsd.stream(told, IDS[:1], stop=stop, **arguments)) == text
