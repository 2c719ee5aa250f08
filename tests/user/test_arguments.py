"""Odd values in every argument: each is refused in one sentence that names it, before anything is traced or compiled."""

import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAMILIES, write_family

import mlspecqd_jax as mlsd
from mlspecqd_jax import arguments
from mlspecqd_jax.arguments import NUMBERS, brief
from mlspecqd_jax.speculation import loop

pytestmark = pytest.mark.usefixtures("compiled_quickly")


class Unspeakable:
    """Nothing that a message could show."""

    def __repr__(self):
        raise RuntimeError


ODD = {
    "none": None,
    "true": True,
    "minus": -1,
    "huge": 10**5000,
    "half": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "complex": 1j,
    "text": "text",
    "empty": "",
    "bytes": b"\x01\x02",
    "list": [None],
    "texts": ["a", ["b"]],
    "nested": [[["a"]]],
    "many": [1] * 999,
    "endless": range(10**15),
    "tuple": (),
    "set": {1.5},
    "dict": {"a": "b"},
    "generator": (i for i in range(3)),
    "object": Unspeakable(),
    "class": mlsd.Level,
    "function": len,
    "floats": np.full((1, 3), 0.5),
    "rank": np.zeros((2, 2, 2), np.int32),
    "booleans": np.array([True]),
    "texts array": np.array(["a"]),
    "objects": np.array([object()]),
    "float array": jnp.full((3,), jnp.nan),
}

# What is lawful here and there, by argument; every other pair must be refused.
WHOLE = {"huge"}
LAWFUL = {
    "prompts": {"text"},
    "max_new_tokens": {"none"},
    "chat": {"true"},
    "chat_template_kwargs": {"none"},
    "temperature": {"half"},
    "top_k": WHOLE,
    "top_p": {"half"},
    "min_p": {"half"},
    "draft_limit": WHOLE,
    "repetition_penalty": {"half"},
    "presence_penalty": {"half", "minus"},
    "frequency_penalty": {"half", "minus"},
    "logit_bias": {"none"},
    "stop_token_ids": {"none", "tuple"},
    "stop": {"none", "text", "tuple"},
    "logprobs": {"true"},
    "synthetic_acceptance": {"none", "half", "tuple"},
    "rounds": {"none"},
    "policy": {"none"},
    "exact": {"true"},
    "share_cache": {"true"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model without a tokenizer."""
    return mlsd.load(write_family(tmp_path_factory.mktemp("qwen3"), "qwen3"), dtype="float32")


@pytest.fixture(scope="module")
def calls(model):
    """By argument, a function of its value alone whose others are sound."""
    stack, vocab = mlsd.stack(model), FAMILIES["qwen3"]["vocab_size"]
    tokens, length = jnp.ones((1, 512), jnp.int32), jnp.full((1,), 3)
    settings = mlsd.Sampling.create(1, vocab)
    state = jax.eval_shape(loop.init, stack, tokens, length, settings)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    names = sorted(mlsd.Arguments.__annotations__)
    found = {
        **{f"generate {name}": lambda value, name=name: mlsd.generate(stack, [[1, 2]], **{name: value}) for name in names},
        **{f"stream {name}": lambda value, name=name: mlsd.stream(stack, [[1, 2]], **{name: value}) for name in names},
        "generate stack": lambda value: mlsd.generate(value, [[1, 2]]),
        "generate prompts": lambda value: mlsd.generate(stack, value),
        "stream stack": lambda value: mlsd.stream(value, [[1, 2]]),
        "stream prompts": lambda value: mlsd.stream(stack, value),
        "compare stack": lambda value: mlsd.compare(value, [[1, 2]]),
        "compare prompts": lambda value: mlsd.compare(stack, value),
        "prepare stack": lambda value: mlsd.prepare(value, [[1, 2]]),
        "prepare prompts": lambda value: mlsd.prepare(stack, value),
        "prepare max_new_tokens": lambda value: mlsd.prepare(stack, [[1, 2]], max_new_tokens=value),
        "stack target": lambda value: mlsd.stack(value),
        "stack drafter": lambda value: mlsd.stack(model, value),
        "stack draft_len": lambda value: mlsd.stack(model, (mlsd.prompt_lookup(), value)),
        "stack exact": lambda value: mlsd.stack(model, exact=value),
        "stack share_cache": lambda value: mlsd.stack(model, share_cache=value),
        "quantized format": lambda value: model.quantized(value),
        "quantized policy": lambda value: model.quantized(policy=value),
        "quantized scale_rule": lambda value: model.quantized(scale_rule=value),
        "prompt_lookup max_ngram": lambda value: mlsd.prompt_lookup(value),
        "prompt_lookup min_ngram": lambda value: mlsd.prompt_lookup(min_ngram=value),
        "create batch": lambda value: mlsd.Sampling.create(value, vocab),
        "create vocab_size": lambda value: mlsd.Sampling.create(1, value),
        "buffer_length longest": lambda value: mlsd.buffer_length(value),
        "buffer_length multiple": lambda value: mlsd.buffer_length(1, value),
        "init stack": lambda value: mlsd.init(value, tokens, length, settings),
        "init tokens": lambda value: mlsd.init(stack, value, length, settings),
        "init length": lambda value: mlsd.init(stack, tokens, value, settings),
        "init sampling": lambda value: mlsd.init(stack, tokens, length, value),
        "init prefill_width": lambda value: mlsd.init(stack, tokens, length, settings, prefill_width=value),
        "step stack": lambda value: mlsd.step(value, state, length, settings),
        "step state": lambda value: mlsd.step(stack, value, length, settings),
        "step limit": lambda value: mlsd.step(stack, state, value, settings),
        "step sampling": lambda value: mlsd.step(stack, state, length, value),
        "advance state": lambda value: mlsd.advance(stack, value, length, settings),
        "advance limit": lambda value: mlsd.advance(stack, state, value, settings),
        "advance rounds": lambda value: mlsd.advance(stack, state, length, settings, value),
        "finished state": lambda value: mlsd.finished(value, length),
        "finished limit": lambda value: mlsd.finished(state, value),
        "generate_tokens stack": lambda value: mlsd.generate_tokens(value, tokens, length, length, settings),
        "generate_tokens tokens": lambda value: mlsd.generate_tokens(stack, value, length, length, settings),
        "generate_tokens limit": lambda value: mlsd.generate_tokens(stack, tokens, length, value, settings),
    }
    return found


def test_every_odd_value_is_refused_in_one_line_and_at_once(calls, monkeypatch):
    def compiled(*_, **__):
        raise AssertionError("this was to be refused before it is traced")

    for name in ("run_rounds", "DrafterState"):  # what every trace of a generation comes by
        monkeypatch.setattr(loop, name, compiled)
    monkeypatch.setattr(mlsd.Level, "init", compiled)
    wrong, tried = [], 0
    for call, function in calls.items():
        name = call.split(" ")[1]
        for odd in sorted(set(ODD) - LAWFUL.get(name, set())):
            tried, began = tried + 1, time.monotonic()
            try:
                function(ODD[odd])
                wrong.append(f"{call} = {odd}: taken")
            except ValueError as error:
                if "\n" in str(error) or len(str(error)) > 600 or not str(error):
                    wrong.append(f"{call} = {odd}: {error}")
                trace = error.__traceback__
                while trace.tb_next is not None:
                    trace = trace.tb_next
                if trace.tb_frame.f_globals["__name__"].split(".")[0] != "mlspecqd_jax":
                    wrong.append(f"{call} = {odd}: raised by {trace.tb_frame.f_globals['__name__']}: {error}")
            except Exception as error:
                wrong.append(f"{call} = {odd}: {type(error).__name__}: {error}")
            assert time.monotonic() - began < 60, f"{call} = {odd} hangs"
    assert not wrong, "\n".join(wrong)
    assert tried > 1500


def test_the_sentence_names_the_argument(calls):
    for call in calls:
        name = call.split(" ")[1]
        with pytest.raises(ValueError, match="prompt" if name == "prompts" else name if name != "target" else "target"):
            calls[call](ODD["object"])


def test_the_table_has_every_number_that_sampling_takes():
    defaults = inspect.signature(mlsd.Sampling.create).parameters
    of_numbers = {name for name, p in defaults.items() if isinstance(p.default, (int, float)) and not isinstance(p.default, bool)}
    assert of_numbers <= set(NUMBERS)


def test_numbers_are_taken_in_every_form():
    for one in (2, np.int64(2), np.array(2), jnp.int32(2)):
        assert arguments.each_row("top_k", one, 3) == [2, 2, 2]
    for several in ([1, 2], (1, 2), range(1, 3), np.array([1, 2]), jnp.array([1, 2])):
        assert arguments.each_row("top_k", several, 2) == [1, 2]
    for one in (0.5, np.float32(0.5), jnp.bfloat16(0.5), jnp.full((), 0.5, jnp.bfloat16)):
        assert arguments.each_row("top_p", one, 1) == [0.5]


def test_a_traced_value_is_refused_where_it_must_be_known():
    with pytest.raises(ValueError, match="temperature is a traced value, but must be 0"):
        jax.jit(lambda t: mlsd.Sampling.create(1, 9, temperature=t).temperature)(0.5)


@pytest.mark.parametrize("value", [*ODD.values(), "x\ny" * 10**6, [[0] * 10**5] * 100], ids=lambda x: type(x).__name__)
def test_a_message_shows_any_value_in_one_short_line(value):
    assert "\n" not in brief(value)
    assert len(brief(value)) < 200
