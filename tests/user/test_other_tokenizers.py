"""Drafts of another tokenizer: how a stack is built of one, and that the same weights under another numbering draft the same."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused
from short_prompts import NEW, PROMPTS
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import mlspecqd_jax as mlsd
from mlspecqd_jax.network.config import ShortConv
from mlspecqd_jax.speculation.translated import Translated
from mlspecqd_jax.weights.tensors import EMBEDDING

pytestmark = pytest.mark.usefixtures("compiled_quickly")

END = "<|endoftext|>"


def renumbered(model, name="renumbered"):
    """The same model with its tokens in another order: token t of the original is order[t]."""
    size = model.card.vocab_size
    order = np.random.default_rng(0).permutation(size)
    file = json.loads(model.tokenizer.backend_tokenizer.to_str())
    vocab = file["model"]["vocab"]
    file["model"]["vocab"] = {token: int(order[i]) for token, i in vocab.items()}
    for token in file["added_tokens"]:
        token["id"] = int(order[token["id"]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(file)), eos_token=END)
    ends = tuple(int(order[i]) for i in model.card.eos_token_ids)
    card = dataclasses.replace(model.card, name=name, tokenizer=tokenizer, eos_token_ids=ends)
    params = model.params | {EMBEDDING: model.embedding[jnp.asarray(np.argsort(order))]}  # the head too
    return dataclasses.replace(model, params=params, card=card)


@pytest.mark.slow
def test_the_same_weights_renumbered_draft_as_they_do(quick, other, capsys):
    """Law 4, greedy and with noise: the target accepts as many of the draft's tokens, row by row."""
    arguments = {"max_new_tokens": NEW, "temperature": [0, 0.8, 1.2], "seed": 3}
    ordinary, ours = (mlsd.generate(mlsd.stack(quick, (drafts, 4)), PROMPTS, **arguments) for drafts in (other, renumbered(other)))
    assert ours.tokens == ordinary.tokens
    assert ours.report["requests"] == ordinary.report["requests"]
    assert [level["name"] for level in ours.report["levels"]] == ["quick", "renumbered"]
    assert "renumbered: a draft of another tokenizer; 8,191 of its 8,191 tokens are tokens of quick\n" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["coupled", pytest.param("rejection", marks=pytest.mark.exhaustive)])
def test_a_renumbered_demo_drafts_as_the_demo(rule):
    """Law 4, for a chain: with its twin below, and look-up below that."""
    demo = mlsd.load("demo-small", dtype="float32")
    arguments = {"max_new_tokens": 2 * NEW, "temperature": [0, 0.8, 1.2], "seed": 3, "rule": rule}
    chains = [((one, 6), (one.quantized(), 3), (mlsd.prompt_lookup(), 2)) for one in (demo, renumbered(demo))]
    ordinary, ours = (mlsd.generate(mlsd.stack(demo, *chain, share_cache=False), PROMPTS, **arguments) for chain in chains)
    assert ours.tokens == ordinary.tokens
    assert ours.report["requests"] == ordinary.report["requests"]


def test_stacks_translate_each_level_of_another_tokenizer(quick, other, capsys):
    foreign = renumbered(other, "foreign")
    stack = mlsd.stack(quick, (foreign, 6), (foreign.quantized(), 3), (other, 2), mlsd.prompt_lookup())
    assert [isinstance(level.model, Translated) for level in stack.levels] == [False, True, True, False]
    assert [level.share_cache for level in stack.levels] == [False, False, True, False]
    assert [level.model.vocab_size for level in stack.levels] == [quick.card.vocab_size] * 4
    one, twin = stack.levels[1:3]
    assert one.params.dictionary.first is twin.params.dictionary.first
    assert one.model == Translated(foreign.network, quick.card.vocab_size, 1.0, foreign.card.max_positions)
    assert capsys.readouterr().err.count("another tokenizer") == 1  # once for all models of it
    mlsd.stack(quick, other)
    assert capsys.readouterr().err == ""


def test_layers_that_do_not_keep_all_positions_are_refused(quick, other):
    """How far a window goes back in a draft's own tokens is not known."""
    foreign = renumbered(other, "foreign")
    layers = tuple(dataclasses.replace(layer, mixer=ShortConv(3)) for layer in foreign.network.config.layers)
    network = dataclasses.replace(foreign.network, config=dataclasses.replace(foreign.network.config, layers=layers))
    with refused("foreign has layers that do not keep all positions and another tokenizer than quick"):
        mlsd.stack(quick, dataclasses.replace(foreign, network=network))


def test_a_tokenizer_that_shares_too_little_is_refused(quick, other):
    foreign = renumbered(other, "foreign")
    file = json.loads(foreign.tokenizer.backend_tokenizer.to_str())
    vocab = file["model"]["vocab"]
    file["model"] |= {"vocab": {token if len(token) == 1 else f"ĠĠĠĠĠ{token}ĠĠ": i for token, i in vocab.items()}, "merges": []}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(file)), eos_token=END)
    foreign = dataclasses.replace(foreign, card=dataclasses.replace(foreign.card, tokenizer=tokenizer))
    with refused("the tokenizers of foreign and quick differ: token", "and only ", "draft with a model of the target's tokenizer"):
        mlsd.stack(quick, foreign)
