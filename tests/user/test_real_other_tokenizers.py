"""Law 5 on a real model and the demo, whose tokenizers differ, each as the other's draft; greedy, and with noise."""

import pytest
import real

import mlspecqd_jax as mlsd

pytestmark = pytest.mark.real


@pytest.mark.parametrize("rule", ["coupled", pytest.param("rejection", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("demo_drafts", [True, False])
def test_tokens_are_plain_decodings(shared, demo_drafts, rule):
    """Law 5; under rejection, where a seed has other text, of the greedy rows."""
    models = real.load(), mlsd.load("demo")
    target, draft = models if demo_drafts else models[::-1]
    prompts = [row["prompt"] for row in real.lines(shared / "prompts" / "HumanEval.jsonl.gz")]
    prompts = sorted(prompts, key=len)[:6]
    arguments = {"max_new_tokens": 48, "temperature": [0, 0.8] * 3, "seed": 0, "rule": rule}
    plain, ours = (mlsd.generate(mlsd.stack(target, *drafters), prompts, **arguments) for drafters in ([], [(draft, 5)]))
    same = slice(None, None, 1 if rule == "coupled" else 2)
    assert ours.tokens[same] == plain.tokens[same]
    assert ours.report["levels"][0]["accepted"] > 0
