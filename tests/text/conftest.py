"""Tokenizers of every kind."""

import pathlib

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from toy_tokenizers import DECODERS, EOS, USUAL, sentencepiece
from transformers import PreTrainedTokenizerFast

from mlspecqd_jax.text import tokenizer_files


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


@pytest.fixture(scope="module", params=list(DECODERS))
def spaced(request):
    return sentencepiece(DECODERS[request.param]())


@pytest.fixture(scope="module", params=["byte level", "llama", "metaspace"])
def any_tokenizer(request, byte_level):
    """Each kind of tokenizer, with two special tokens."""
    tokenizer = byte_level if request.param == "byte level" else sentencepiece(DECODERS[request.param]())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


@pytest.fixture(params=[*USUAL, "demo", "tokenizers/gpt2", "models/stories260K", "models/SmolLM2-135M"])
def usual_tokenizer(request):
    """Tokenizers in the way of well-known models, and those of models at hand."""
    if request.param in USUAL:
        return USUAL[request.param]()
    if request.param == "demo":
        return tokenizer_files.read_tokenizer(pathlib.Path(__file__).resolve().parents[2] / "checkpoints" / "demo")
    return tokenizer_files.read_tokenizer(request.getfixturevalue("shared") / request.param)
