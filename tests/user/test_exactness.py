"""Laws 5 and 6 on real weights: with drafts or without, alone or in a batch, the same tokens, in float32 and in bfloat16."""

import json

import pytest

import mlspecqd_jax as mlsd
from mlspecqd_jax import specs

pytestmark = pytest.mark.exhaustive
CHOICES = {"greedy": {}, "coupled": {"temperature": 0.8, "seed": 7}}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def stories(request, shared):
    return mlsd.load(shared / "models" / "stories260K", dtype=request.param)


@pytest.fixture(scope="module")
def prompts(shared):
    texts = json.loads((shared / "prompts" / "tinystories_200.json").read_text())[:100]
    return [" ".join(text.split()[:16]) for text in texts]


@pytest.fixture(scope="module")
def plain(stories, prompts):
    return {
        name: mlsd.generate(mlsd.stack(stories), prompts, max_new_tokens=128, **choice).tokens for name, choice in CHOICES.items()
    }


def first_difference(ours, theirs):
    """Return (row, index) of the first token that differs, for the message of a failure."""
    return next(
        ((r, next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))))
        for r, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if a != b
    )


@pytest.mark.parametrize("share_cache", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("given", ["mxfp4:6", "mxfp4:6 ngram:3", "mxfp8_e4m3:6 mxfp4:3"])
def test_a_hundred_stories_are_those_of_plain_decoding(stories, prompts, plain, given, share_cache):
    drafters = specs.drafters(specs.parse(given.split()), stories, mlsd.load)
    stack = mlsd.stack(stories, *drafters, share_cache=share_cache)
    for name, choice in CHOICES.items():
        out = mlsd.generate(stack, prompts, max_new_tokens=128, **choice)
        assert out.tokens == plain[name], f"{name}: row and index {first_difference(out.tokens, plain[name])}"
        assert out.report["levels"][0]["token_acceptance"] > 0.7


def test_acceptance_is_the_same_alone_and_in_a_batch_of_sixteen(shared, prompts):
    model = mlsd.load(shared / "models" / "stories260K", dtype="float32")
    stack = mlsd.stack(model, (model.quantized(), 6), (mlsd.prompt_lookup(), 3))
    for choice in CHOICES.values():
        batch = mlsd.generate(stack, prompts[:16], max_new_tokens=64, **choice)
        seed = choice.get("seed", 0)
        for r in range(0, 16, 5):
            alone = mlsd.generate(stack, prompts[r], max_new_tokens=64, **choice | {"seed": seed + r})
            assert alone.tokens[0] == batch.tokens[r]
            assert alone.report["requests"][0] == batch.report["requests"][r]
