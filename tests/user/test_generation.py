"""Text in, text out, and the report (C11): `load`, `stack`, `generate`, `stream` on the demo checkpoint."""

import dataclasses
import json

import numpy as np
import pytest
from short_prompts import IDS, NEW, PROMPTS
from tiny import FAMILIES, weights, write_checkpoint

import mlspecqd_jax as mlsd
from mlspecqd_jax import generation


def greedy_by_hand(demo, ids, n):
    """Decode by scoring the whole text anew for every token: the definition of greedy decoding."""
    import jax.numpy as jnp

    size = len(ids) + n
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(ids)] = ids
    for end in range(len(ids), size):
        logits, *_ = demo.network(demo.params, jnp.asarray(padded), jnp.zeros((1,), jnp.int32), None)
        padded[0, end] = int(jnp.argmax(logits[0, end - 1]))
    return padded[0, len(ids) :].tolist()


@pytest.mark.slow
def test_greedy_is_the_argmax_of_the_whole_text(demo, stack):
    out = mlsd.generate(stack, PROMPTS[0], max_new_tokens=NEW)
    expected = greedy_by_hand(demo, out.prompt_tokens[0], NEW)
    stop = next((i + 1 for i, t in enumerate(expected) if t in stack.card.eos_token_ids), NEW)
    assert out.tokens[0] == expected[:stop]
    assert out.text[0] == demo.tokenizer.decode(out.prompt_tokens[0] + out.tokens[0], skip_special_tokens=True)[len(PROMPTS[0]) :]


@pytest.mark.parametrize(
    "rule", [pytest.param("coupled", marks=pytest.mark.slow), pytest.param("rejection", marks=pytest.mark.exhaustive)]
)
def test_row_r_of_a_batch_at_seed_s_is_that_prompt_alone_at_seed_s_plus_r(stack, rule):
    arguments = {"max_new_tokens": NEW, "temperature": 0.9, "top_p": 0.95, "rule": rule}
    batch = mlsd.generate(stack, PROMPTS, seed=5, **arguments)
    for r, prompt in enumerate(PROMPTS):
        alone = mlsd.generate(stack, prompt, seed=5 + r, **arguments)
        assert alone.tokens[0] == batch.tokens[r]
    other = mlsd.generate(stack, PROMPTS, seed=50, **arguments)
    assert other.tokens != batch.tokens


@pytest.mark.slow
def test_a_stack_built_again_is_not_traced_again(demo, stack):
    mlsd.generate(stack, PROMPTS[0], max_new_tokens=4)
    before = [f._cache_size() for f in generation.programs(stack)]
    mlsd.generate(mlsd.stack(demo), PROMPTS[1], max_new_tokens=5, temperature=0.5, seed=9)
    assert [f._cache_size() for f in generation.programs(stack)] == before


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_sixteen_bits_generate(dtype):
    model = mlsd.load("demo", dtype=dtype)
    assert {leaf.dtype.name for leaf in model.params.values()} == {dtype}
    out = mlsd.generate(mlsd.stack(model), PROMPTS[0], max_new_tokens=8)
    assert out.report["dtype"] == dtype
    assert len(out.tokens[0]) == 8 or out.finish_reason == ["stop"]


@pytest.mark.slow
def test_inexact_differs_in_the_window_alone(demo, stack):
    fast = mlsd.stack(demo, exact=False)
    assert (fast.level.window(), stack.level.window()) == (1, 1)  # the C++ kernels compute every row by itself
    a, b = (mlsd.generate(s, PROMPTS, max_new_tokens=NEW) for s in (fast, stack))
    assert a.tokens == b.tokens  # float32
    assert (a.report["exact"], b.report["exact"]) == (False, True)


@pytest.mark.parametrize("arguments", [{}, {"temperature": 1.0, "seed": 3}, {"max_new_tokens": 1}])
def test_stream_is_generate_in_pieces(stack, arguments):
    whole = mlsd.generate(stack, PROMPTS[1], **{"max_new_tokens": NEW} | arguments)
    streamed = mlsd.stream(stack, PROMPTS[1], **{"max_new_tokens": NEW} | arguments)
    pieces = list(streamed)
    assert "".join(pieces) == whole.text[0]
    assert streamed.generation.tokens == whole.tokens
    assert len(pieces) > 1 or arguments.get("max_new_tokens") == 1


def test_logprobs_are_the_models_own(demo, stack):
    import jax
    import jax.numpy as jnp

    out = mlsd.generate(stack, PROMPTS[0], max_new_tokens=NEW, logprobs=True, temperature=1.3, top_k=9, repetition_penalty=1.2)
    ids = out.prompt_tokens[0] + out.tokens[0]
    logits, *_ = demo.network(demo.params, jnp.asarray([ids]), jnp.zeros((1,), jnp.int32), None)
    own = jax.nn.log_softmax(logits[0], axis=-1)
    begin = len(out.prompt_tokens[0])
    expected = [float(own[begin - 1 + i, t]) for i, t in enumerate(out.tokens[0])]
    np.testing.assert_allclose(out.logprobs[0], expected, rtol=1e-4, atol=1e-4)


def test_token_ids_in_and_no_tokenizer_needed(demo, stack):
    text = mlsd.generate(stack, PROMPTS[0], max_new_tokens=8)
    bare = mlsd.stack(dataclasses.replace(demo, card=dataclasses.replace(demo.card, tokenizer=None)))
    ids = mlsd.generate(bare, text.prompt_tokens, max_new_tokens=8)
    assert ids.tokens == text.tokens
    assert ids.text == [""]
    with pytest.raises(ValueError, match=r"no tokenizer.*tokenizer\.json"):
        mlsd.generate(bare, "text")
    with pytest.raises(ValueError, match="stop strings need"):
        mlsd.generate(bare, [[1]], stop="x")


def test_report(stack):
    out = mlsd.generate(stack, PROMPTS, max_new_tokens=[4, 6, 5], stop_token_ids=[])
    r = json.loads(json.dumps(out.report))
    level = r["levels"][0]
    assert (level["name"], level["draft_len"], level["rounds"], level["passes"]) == ("demo", 0, 15, 6)
    assert level["acceptance_rate"] is None
    assert level["mean_acceptance_length"] is None
    assert [request["new_tokens"] for request in r["requests"]] == [4, 6, 5]
    assert [request["rounds"] for request in r["requests"]] == [4, 6, 5]
    assert (r["rule"], r["exact"], r["dtype"], r["new_tokens"], r["speedup"]) == ("coupled", True, "float32", 15, None)
    assert r["tokens_per_second"] == pytest.approx(15 / r["seconds"])


def test_compare_reports_a_speedup_and_the_same_text(stack):
    out = mlsd.compare(stack, PROMPTS[0], max_new_tokens=8)
    assert out.report["speedup"] > 0
    assert out.tokens == mlsd.generate(stack, PROMPTS[0], max_new_tokens=8).tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, r"'num_beams' is not supported; supported: .*temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be a positive whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens has 2 entries, but must be a number or one for each of 1 rows"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"rule": "greedy"}, "rule is 'greedy', but must be one of coupled, rejection"),
        ({"stop": ""}, "stop is"),
        ({"stop": [3]}, "stop is"),
    ],
)
def test_bad_arguments_are_one_sentence(stack, arguments, message):
    before = generation.programs(stack).advance._cache_size()
    with pytest.raises(ValueError, match=message) as caught:
        mlsd.generate(stack, "x", **arguments)
    assert "\n" not in str(caught.value)
    assert generation.programs(stack).advance._cache_size() == before  # refused before tracing


def test_arguments_are_those_of_the_batch_and_of_sampling():
    assert set(mlsd.Arguments.__annotations__) == {
        "max_new_tokens",
        "chat",
        "chat_template_kwargs",
        "stop",
        *mlsd.Fixed.create.__wrapped__.__kwdefaults__,
        *mlsd.Sampling.create.__wrapped__.__kwdefaults__,
    }


def test_bad_prompts(stack):
    for prompts, message in [
        ("", "prompt 0 is empty"),
        (["x", ""], "prompt 1 is empty"),
        ([], "no prompt was given"),
        ([[]], "prompt 0 is empty"),
        ([[10**6]], "prompt 0 has token id 1000000"),
        ([3], "prompt 0 is 3, but must be a text, a list of token ids or a list of messages"),
        ({"prompt": "x"}, "prompts is {'prompt': 'x'}, but must be a text, a list of texts"),
    ]:
        with pytest.raises(ValueError, match=message):
            mlsd.generate(stack, prompts)
    with pytest.raises(ValueError, match="stream continues one prompt, but 2 were given"):
        mlsd.stream(stack, ["a", "b"])
    with pytest.raises(ValueError, match="dtype is 'int8', but must be one of bfloat16"):
        mlsd.load("demo", dtype="int8")


def overflowing(folder):
    """A model as good as any in bfloat16, whose residual stream leaves float16: all that norms divide is large."""
    config = FAMILIES["llama2"]
    grown = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    tensors = {name: x * (20_000 if name.endswith(grown) else 1) for name, x in weights(config, "llama2").items()}
    return write_checkpoint(folder, config, tensors)


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.slow
def test_a_model_that_leaves_float16_is_refused_in_one_sentence_and_runs_in_bfloat16(tmp_path):
    folder = overflowing(tmp_path / "m")
    prompts = [[1, 2, 3], [4, 5]]
    model = mlsd.load(folder, dtype="float16")
    drafted = mlsd.stack(model, (mlsd.prompt_lookup(), 2))
    sentence = r'row 0: after \d new tokens .*m gives logits .*float16; load it with dtype "bfloat16"$'
    with pytest.raises(ValueError, match=sentence):
        mlsd.generate(mlsd.stack(model), prompts, max_new_tokens=20)
    with pytest.raises(ValueError, match=sentence):
        list(mlsd.stream(drafted, [[1, 2, 3]], max_new_tokens=20, temperature=0.8, top_k=5))
    out = mlsd.generate(mlsd.stack(mlsd.load(folder)), prompts, max_new_tokens=20)
    assert [len(set(row)) > 1 for row in out.tokens] == [True, True]


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.slow
def test_broken_weights_are_told_from_a_narrow_dtype(small):
    params = small.params | {"model.norm.weight": small.params["model.norm.weight"] * np.nan}
    with pytest.raises(ValueError, match=r"row 0: after 0 new tokens .* gives logits .* its weights are broken.*float32"):
        mlsd.generate(mlsd.stack(dataclasses.replace(small, params=params)), IDS, max_new_tokens=[NEW, 5, 1], logprobs=True)


@pytest.mark.slow
def test_real_stories(shared):
    """A model of the field's, in float32: its known greedy text, and its known loss on stories."""
    import jax
    import jax.numpy as jnp

    model = mlsd.load(shared / "models" / "stories260K", dtype="float32")
    out = mlsd.generate(mlsd.stack(model), "Once upon a time", max_new_tokens=40)
    assert out.text[0].startswith(", there was a little girl named Lily. She loved to play outside in the park.")

    stories = json.loads((shared / "prompts" / "tinystories_200.json").read_text())[:20]
    score = jax.jit(lambda tokens: jax.nn.log_softmax(model.network(model.params, tokens, jnp.zeros((1,), jnp.int32), None)[0]))
    total, count = 0.0, 0
    for story in stories:
        ids = model.tokenizer(story)["input_ids"][:512]
        assert ids[0] == 1  # the text begins with BOS
        padded = np.zeros((1, 512), np.int32)
        padded[0, : len(ids)] = ids
        own = np.asarray(score(jnp.asarray(padded)))[0]
        total -= sum(own[i, t] for i, t in enumerate(ids[1:]))
        count += len(ids) - 1
    assert total / count == pytest.approx(1.33, abs=0.01)
