"""A real model's GGUF file against the folder that was made of the same weights."""

import os
import warnings

import numpy as np
import pytest
import real

import mlspecqd_jax as mlsd
from mlspecqd_jax.text.detokenizer import encode

FILE = "MLSPECQD_REAL_GGUF"  # names the file
TEXTS = ["a  12 hello\n\nworld  x3.14 don't DON'T", "é中文 12345   ", "<|im_start|>user\nHi<|im_end|>"]

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def models():
    if not os.environ.get(FILE):
        pytest.skip(f"needs {FILE}, a GGUF file of the weights in {real.FOLDER}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*dequantized")
        return real.load(), mlsd.load(os.environ[FILE])


def test_weights_are_the_same_bits(models):
    folder, file = models
    assert file.network == folder.network
    assert file.network.config.layers == folder.network.config.layers
    assert file.params.keys() == folder.params.keys()
    for name, leaf in folder.params.items():
        np.testing.assert_array_equal(file.params[name], leaf, err_msg=name)


def test_texts_and_chats_are_the_same_tokens(models, shared):
    folder, file = models
    prompts = [row["text"] for row in real.lines(shared / "prompts" / "mbpp.jsonl")[:50]]
    for text in [*TEXTS, *prompts]:
        ids = folder.tokenizer(text)["input_ids"]
        assert file.tokenizer(text)["input_ids"] == ids
        assert file.tokenizer.decode(ids) == folder.tokenizer.decode(ids) == text
    assert encode(file.card, prompts, chat=True) == encode(folder.card, prompts, chat=True)
    assert file.tokenizer.special_tokens_map == folder.tokenizer.special_tokens_map
    assert file.card.eos_token_ids == folder.card.eos_token_ids
    assert file.card.chat_end_token_ids == folder.card.chat_end_token_ids
