"""Drafted generation on the demo checkpoint: the text of plain decoding, and what is reported of the drafts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from short_prompts import NEW, PROMPTS

import mlspecqd_jax as mlsd
from mlspecqd_jax import generation, specs
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.tensors import EMBEDDING

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:demo accepts", "ignore:other accepts")
@pytest.mark.parametrize(
    ("given", "share_cache"),
    [
        (["mxfp4:4", "ngram:3"], True),
        pytest.param(["mxfp4"], False, marks=exhaustive),
        pytest.param(["mxfp4:5", "other:2"], True, marks=slow),
        pytest.param(["other@mxfp6_e2m3:3", "ngram"], True, marks=slow),
        pytest.param(["mxfp8_e4m3:6", "mxfp4:3"], True, marks=exhaustive),
        pytest.param(["other:4", "mxfp4:2"], False, marks=slow),
    ],
    ids=str,
)
def test_every_stack_gives_the_text_of_plain_decoding(demo, other, given, share_cache, monkeypatch):
    monkeypatch.setattr(specs, "is_known", lambda name: name == "other")
    stack = mlsd.stack(demo, *specs.drafters(specs.parse(given), demo, lambda name: other), share_cache=share_cache)
    for choice in ({}, {"temperature": 0.8, "seed": 3}):
        arguments = {"max_new_tokens": [NEW, NEW - 5, NEW + 4], "logprobs": True} | choice
        plain = mlsd.generate(mlsd.stack(demo), PROMPTS, **arguments)
        out = mlsd.generate(stack, PROMPTS, **arguments)
        assert out.tokens == plain.tokens
        assert out.text == plain.text
        for ours, theirs in zip(out.logprobs, plain.logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        levels = out.report["levels"]
        assert len(levels) == len(given) + 1
        assert levels[0]["accepted"] > 0


@exhaustive
def test_prompts_across_the_edges_of_buckets(quick):
    """Of the pieces in which prompts are fed, to the target's cache and to a draft's own, and of the buffer."""
    draft = dataclasses.replace(quick, params=quick.params | {"model.norm.weight": 1.1 * quick.params["model.norm.weight"]})
    stack = mlsd.stack(quick, (draft, 3), (quick.quantized(), 2), share_cache=False)
    rng = np.random.default_rng(0)
    for lengths_ in ([1, 16, 17], [18, 64, 65], [66, 171, 172], [173, 256, 257], [258, 428, 429]):
        prompts = [rng.integers(1, 4000, size=n).tolist() for n in lengths_]
        plain = mlsd.generate(mlsd.stack(quick), prompts, max_new_tokens=20, stop_token_ids=[])
        out = mlsd.generate(stack, prompts, max_new_tokens=20, stop_token_ids=[])
        assert out.tokens == plain.tokens
        # The same model but for a scale is always right when greedy, if it was fed the prompt.
        assert out.report["levels"][0]["token_acceptance"] == 1


def test_the_twin_is_accepted_and_reported_by_level_and_request(demo):
    stack = mlsd.stack(demo, (demo.quantized(), 4), (mlsd.prompt_lookup(), 3))
    out = mlsd.generate(stack, PROMPTS, max_new_tokens=48, stop_token_ids=[], logprobs=True)
    target, twin, lookup = out.report["levels"]
    assert [level["name"] for level in (target, twin, lookup)] == ["demo", "demo@mxfp4", "ngram"]
    assert [level["draft_len"] for level in (target, twin, lookup)] == [4, 3, 0]
    assert target["token_acceptance"] > 0.6
    assert target["accepted"] + target["rounds"] == 3 * 48
    assert target["acceptance_rate"] == target["accepted"] / target["drafted"]
    assert target["mean_acceptance_length"] == 1 + target["accepted"] / target["rounds"]
    assert [len(level["acceptance_by_position"]) for level in (target, twin, lookup)] == [4, 3, 0]
    assert [sum(level["judged_by_position"]) for level in (target, twin, lookup)] == [target["judged"], twin["judged"], 0]
    assert (lookup["token_acceptance"], lookup["passes"], lookup["rounds"]) == (None, 0, 0)
    requests = out.report["requests"]
    for count in ("rounds", "drafted", "accepted", "judged"):
        assert sum(request[count] for request in requests) == target[count]
        assert sum(request["below"][0][count] for request in requests) == twin[count]


@pytest.mark.usefixtures("compiled_quickly")
@slow
def test_a_draft_that_is_never_right_is_warned_of(quick):
    twin = quick.quantized()
    wrong = dataclasses.replace(twin, params=twin.params | {"model.norm.weight": -twin.params["model.norm.weight"]})
    arguments = {"max_new_tokens": 20, "stop_token_ids": []}
    with pytest.warns(UserWarning, match=r"quick accepts \d% of the tokens that quick@mxfp4 drafts \(\d+ judged\)"):
        out = mlsd.generate(mlsd.stack(quick, (wrong, 4)), PROMPTS * 2, **arguments)
    assert out.tokens == mlsd.generate(mlsd.stack(quick), PROMPTS * 2, **arguments).tokens


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_synthetic_acceptance_is_what_was_asked_for_and_marked(quick):
    stack = mlsd.stack(quick, (quick.quantized(), 4))
    for rate in (1.0, 0.0):
        out = mlsd.generate(stack, PROMPTS, max_new_tokens=20, stop_token_ids=[], synthetic_acceptance=[rate])
        assert out.report["synthetic_acceptance"] == [rate]
        assert [level["token_acceptance"] for level in out.report["levels"]] == [rate, None]
    with pytest.raises(ValueError, match="synthetic_acceptance has 2 rates, but 1 levels of the stack judge a draft"):
        mlsd.generate(stack, PROMPTS, synthetic_acceptance=[0.5, 0.5])
    with pytest.raises(ValueError, match=r"synthetic_acceptance is 1\.5, but must be a probability"):
        mlsd.generate(stack, PROMPTS, synthetic_acceptance=1.5)


@exhaustive
def test_padded_vocabularies_of_one_tokenizer_draft_for_each_other(quick):
    """A draft of fewer and of more logits than the target; the latter's favourites are tokens that the target has not got."""
    plain = mlsd.generate(mlsd.stack(quick), PROMPTS, max_new_tokens=NEW, temperature=0.7)
    config, embedding = quick.network.config, quick.params[EMBEDDING]
    for size in (config.vocab_size - 64, config.vocab_size + 64):
        network = Network(dataclasses.replace(config, vocab_size=size))
        padded = jnp.concatenate([embedding, 100 * embedding[:64]])[:size]
        draft = dataclasses.replace(quick, network=network, params=quick.params | {EMBEDDING: padded})
        out = mlsd.generate(mlsd.stack(quick, (draft, 3)), PROMPTS, max_new_tokens=NEW, temperature=0.7)
        assert out.report["levels"][0]["token_acceptance"] > 0.9
        assert out.tokens == plain.tokens


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.slow
def test_a_limit_of_drafts_for_each_row(quick):
    """Rows that draft less, or nothing, say the same."""
    stack = mlsd.stack(quick, (quick.quantized(), 4))
    arguments = {"max_new_tokens": 20, "stop_token_ids": [], "temperature": 0.6}
    free = mlsd.generate(stack, PROMPTS * 2, **arguments)
    before = generation.programs(stack).advance._cache_size()
    out = mlsd.generate(stack, PROMPTS * 2, draft_limit=[0, 2, 99, 4, 4, 4], **arguments)
    assert generation.programs(stack).advance._cache_size() == before
    assert out.tokens == free.tokens
    none, two, all_ = out.report["requests"][:3]
    assert (none["rounds"], none["drafted"]) == (20, 0)
    assert two["acceptance_by_position"][2:] == [None, None]
    assert two["drafted"] > 0
    assert all_ == free.report["requests"][2]
    with pytest.raises(ValueError, match="draft_limit is -1, but must be 0"):
        mlsd.generate(stack, PROMPTS, draft_limit=-1)
