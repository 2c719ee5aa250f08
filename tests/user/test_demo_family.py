"""The demo family: what transformers makes of it, that no stack changes a token, and how much of its twin's drafts is accepted."""

import json
import pathlib

import numpy as np
import pytest

import mlspecqd_jax as mlsd
from mlspecqd_jax import specs
from mlspecqd_jax.loading.find import DEMOS

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = [json.loads(line)["prompt"] for line in (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()]
CHOICES = {"greedy": {}, "coupled": {"temperature": 0.8, "seed": 7}}
STACKS = [
    "mxfp4:5 demo-small@mxfp4:3",
    "mxfp4:6",
    "mxfp8_e4m3:6 mxfp4:3",
    "ngram:6",
    "demo-small@mxfp4:6",
    "mxfp4:6 ngram:3",
]
NEW = 48
FLOOR = 0.75  # of the twin's token acceptance at temperature 0: below it something is wrong


@pytest.fixture(
    scope="module",
    params=[pytest.param("float32", marks=pytest.mark.exhaustive), pytest.param("bfloat16", marks=pytest.mark.slow)],
)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def load(dtype):
    """`mlsd.load` in one dtype, each model once."""
    loaded = {name: mlsd.load(name, dtype=dtype) for name in DEMOS}
    return loaded.__getitem__


@pytest.fixture(scope="module")
def plain(load):
    stack = mlsd.stack(load("demo"))
    return {name: mlsd.generate(stack, PROMPTS, max_new_tokens=NEW, **choice).tokens for name, choice in CHOICES.items()}


def test_the_family_has_one_tokenizer():
    texts = [(ROOT / "checkpoints" / name / "tokenizer.json").read_text() for name in DEMOS]
    assert texts[0] == texts[1]


def test_there_are_fifty_prompts():
    assert len(set(PROMPTS)) == len(PROMPTS) == 50


@pytest.mark.exhaustive
@pytest.mark.parametrize("given", STACKS)
def test_every_stack_gives_what_plain_decoding_gives(load, plain, given):
    target = load("demo")
    stack = mlsd.stack(target, *specs.drafters(specs.parse(given.split()), target, load))
    for name, choice in CHOICES.items():
        out = mlsd.generate(stack, PROMPTS, max_new_tokens=NEW, **choice)
        differing = [r for r, (ours, theirs) in enumerate(zip(out.tokens, plain[name], strict=True)) if ours != theirs]
        assert not differing, f"{name}: the rows {differing} differ"


def test_the_twins_drafts_are_accepted(load, dtype):
    target = load("demo")
    level = mlsd.generate(mlsd.stack(target, (target.quantized(), 6)), PROMPTS, max_new_tokens=NEW).report["levels"][0]
    positions = ", ".join(f"{accepted:.3f}" for accepted in level["acceptance_by_position"])
    print(f"{dtype}, greedy: token acceptance {level['token_acceptance']:.3f}, by position {positions}")
    assert level["token_acceptance"] >= FLOOR
    assert min(level["judged_by_position"]) > 100
    assert min(level["acceptance_by_position"]) >= FLOOR


@pytest.mark.torch
@pytest.mark.parametrize("name", DEMOS)
def test_transformers_gives_the_same_logits_and_greedy_text(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours = mlsd.load(name, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ours.folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ours.folder)
    ids = np.tile(tokenizer("\n\n".join(PROMPTS))["input_ids"], 2)[None, : ours.card.max_positions]
    assert ids.shape == (1, ours.card.max_positions)  # so that every position is compared
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    logits, *_ = ours.network(ours.params, ids, np.zeros(1, np.int32), None)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    out = mlsd.generate(mlsd.stack(ours), PROMPTS[:3], max_new_tokens=NEW)
    for prompt, text in zip(PROMPTS, out.text, strict=False):
        encoded = tokenizer(prompt, return_tensors="pt")
        whole = theirs.generate(**encoded, max_new_tokens=NEW, do_sample=False)[0, encoded["input_ids"].shape[1] :]
        assert tokenizer.decode(whole, skip_special_tokens=True) == text
