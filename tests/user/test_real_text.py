"""A real model's text: against transformers, as a stream, up to a stop string, in a chat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real

import mlspecqd_jax as mlsd

NEW = 60
QUESTION = "Describe a garden in spring in three sentences."

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model():
    return real.load()


@pytest.fixture(scope="module")
def stack(model):
    return mlsd.stack(model, (mlsd.prompt_lookup(), 4))


@pytest.fixture(scope="module")
def answer(stack):
    return mlsd.generate(stack, QUESTION, chat=True, max_new_tokens=NEW)


def test_a_chat_is_answered_and_ends_at_the_end_of_the_turn(model, stack):
    question = "What is the capital of France?"
    out = mlsd.generate(stack, question, chat=True, max_new_tokens=NEW)
    assert "Paris" in out.text[0]
    assert out.finish_reason == ["stop"]
    assert model.tokenizer.convert_ids_to_tokens(out.tokens[0][-1]) == "<|im_end|>"
    assert "<|im_end|>" not in out.text[0]
    assert out.prompt_tokens[0] == real.chat(model.tokenizer, question)


def test_a_stream_s_pieces_are_the_text_of_generate(stack, answer):
    for arguments in ({}, {"temperature": 0.8, "seed": 3}):
        expected = mlsd.generate(stack, QUESTION, chat=True, max_new_tokens=NEW, **arguments) if arguments else answer
        stream = mlsd.stream(stack, QUESTION, chat=True, max_new_tokens=NEW, **arguments)
        pieces = list(stream)
        assert "".join(pieces) == expected.text[0] == stream.generation.text[0]
        assert len(pieces) > 5
        assert stream.generation.tokens == expected.tokens


def test_a_stop_string_ends_the_text_before_it(stack, answer):
    words = answer.text[0].split()
    stop = next(word for word in words[3:] if len(word) > 3)
    out = mlsd.generate(stack, QUESTION, chat=True, max_new_tokens=NEW, stop=stop)
    assert out.text[0] == answer.text[0].partition(stop)[0]
    assert out.finish_reason == ["stop"]
    assert out.tokens[0] == answer.tokens[0][: len(out.tokens[0])]


@pytest.mark.exhaustive
def test_acceptance_is_that_of_trained_weights(model, shared):
    """In a batch of prompts of three kinds the twin is right most of the time, look-up often; on random weights neither is."""
    prompts = real.prompts(model.tokenizer, shared, 6)
    for drafter, least in (((model.quantized(), 5), 0.65), ((mlsd.prompt_lookup(), 4), 0.2)):
        report = mlsd.generate(mlsd.stack(model, drafter), prompts, max_new_tokens=NEW).report
        assert report["levels"][0]["token_acceptance"] > least


@pytest.mark.torch
def test_logits_and_greedy_text_are_those_of_transformers(shared):
    """In float32, over our text: its logits are theirs, and each of its tokens their first choice, or nearly equal to it."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # more would wait for each other, spinning, on cores that other tests have
    ours = real.load("float32")
    theirs = AutoModelForCausalLM.from_pretrained(ours.folder, dtype=torch.float32)
    ends = np.atleast_1d(theirs.generation_config.eos_token_id)
    apply = jax.jit(lambda params, tokens: ours.network(params, tokens, jnp.zeros(1, jnp.int32), None)[0])
    for ids in real.prompts(ours.tokenizer, shared, 6):
        new = mlsd.generate(mlsd.stack(ours), [ids], max_new_tokens=NEW).tokens[0]
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids + new])).logits[0].numpy()
        padded = np.zeros((1, real.LONGEST + NEW), np.int32)
        padded[0, : len(ids) + len(new)] = ids + new
        found = np.asarray(apply(ours.params, jnp.asarray(padded)))[0, : len(ids) + len(new)]
        np.testing.assert_allclose(found, expected, atol=2e-3)
        before = expected[len(ids) - 1 : -1]
        assert np.all(before.max(axis=1) - before[np.arange(len(new)), new] < 1e-3)
        assert np.mean(before.argmax(axis=1) == new) > 0.98
        assert not set(new[:-1]) & set(ends)
        assert len(new) == NEW or new[-1] in ends
