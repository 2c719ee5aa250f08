"""tokenizer.json by `tokenizers` alone: as by transformers, token for token, on every tokenizer that is at hand."""

import copy
import json
import os
import pathlib

import pytest
import tokenizers
from toy_tokenizers import DECODERS, TEXTS, USUAL, sentencepiece
from transformers import PreTrainedTokenizerFast

from mlspecqd_jax.text import chat, tokenizer_files
from mlspecqd_jax.text.fast_tokenizer import FastTokenizer

CHECKPOINTS = pathlib.Path(__file__).resolve().parents[2] / "checkpoints"
REAL = os.environ.get("MLSPECQD_REAL_MODEL")
TEMPLATE = "{{ bos_token or '' }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
MORE = [
    "def f(x):\n    return x\n",
    "<|user|>he<|end|>",
    "<s>he</s>",
    "<|endoftext|>",
    "  two  spaces ",
    "e\u0301\u200d\U0001f469",
    "\x00\ufffd",
]
TOYS = {**USUAL, **{name: lambda make=make: sentencepiece(make()) for name, make in DECODERS.items()}}


def saved(folder, name):
    TOYS[name]().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(params=[*TOYS, "demo", "demo-small", pytest.param("real", marks=pytest.mark.real)])
def folder(request, tmp_path):
    if request.param == "real":
        return pathlib.Path(REAL or pytest.skip("needs MLSPECQD_REAL_MODEL"))
    return saved(tmp_path, request.param) if request.param in TOYS else CHECKPOINTS / request.param


def test_it_is_transformers_tokenizer(folder):
    ours = tokenizer_files.read_tokenizer(folder)
    assert isinstance(ours, FastTokenizer)
    theirs = tokenizer_files.read_tokenizer(folder).whole
    assert isinstance(theirs, PreTrainedTokenizerFast)
    for text in [*TEXTS, *MORE]:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special, verbose=False)["input_ids"]
            assert ours(text, add_special_tokens=special, verbose=False)["input_ids"] == ids
        for skip in (True, False):
            shown = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False) == shown
    for i in (*range(0, len(theirs), 97), len(theirs) - 1, len(theirs)):
        assert ours.convert_ids_to_tokens(i) == theirs.convert_ids_to_tokens(i)
    for name in ("special_tokens_map", "all_special_ids", "bos_token_id", "eos_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.get_vocab(), list(ours.get_added_vocab().items())) == (theirs.get_vocab(), list(theirs.get_added_vocab().items()))
    assert {i: repr(t) for i, t in ours.added_tokens_decoder.items()} == {
        i: repr(t) for i, t in theirs.added_tokens_decoder.items()
    }
    assert len(ours) == len(theirs)
    assert chat.end_token_ids(ours) == chat.end_token_ids(theirs)
    assert ours._made is None, "something above asked transformers"


def test_what_else_is_asked_and_what_is_changed_is_transformers_own(tmp_path):
    ours = tokenizer_files.read_tokenizer(saved(tmp_path, "llama 3"))
    assert ours("he")["input_ids"] == ours.whole("he")["input_ids"]
    assert ours.tokenize("he") == ours.whole.tokenize("he")
    ours.chat_template = "other"
    assert (ours.chat_template, ours.whole.chat_template) == ("other", "other")
    ours.add_tokens(["said he"])
    assert ours("said he")["input_ids"] == [ours.bos_token_id, len(ours) - 1]
    assert isinstance(copy.deepcopy(ours), PreTrainedTokenizerFast)
    with pytest.raises(AttributeError):
        ours._no_such_name  # noqa: B018


@pytest.mark.parametrize("key", ["truncation", "padding", "named", "extra", "flags"])
def test_where_transformers_would_add_something_it_is_asked(tmp_path, key):
    saved(tmp_path, "llama 2")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    match key:
        case "truncation":
            inner.enable_truncation(2)
        case "padding":
            inner.enable_padding(length=9)
        case "named":
            config["pad_token"] = "<pad>"
        case "extra":
            config["extra_special_tokens"] = ["<tool>"]
        case "flags":
            config["added_tokens_decoder"] = {"4": {"content": "<|end|>", "special": True, "lstrip": True, "normalized": False}}
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert isinstance(tokenizer_files.read_tokenizer(tmp_path), PreTrainedTokenizerFast)


def test_tokens_that_are_told_as_they_are_added_need_nothing_more(tmp_path):
    saved(tmp_path, "llama 2")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config["added_tokens_decoder"] = {"4": {"content": "<|end|>"} | flags}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = tokenizer_files.read_tokenizer(tmp_path)
    assert isinstance(ours, FastTokenizer)
    assert ours("he<|end|>")["input_ids"] == ours.whole("he<|end|>")["input_ids"]
