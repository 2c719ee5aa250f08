"""Generation in slices: one text and one trace whatever their size, and an interrupt heeded between them."""

import signal

import numpy as np
import pytest
from short_prompts import IDS, NEW

import mlspecqd_jax as mlsd
from mlspecqd_jax import generation, requests

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.mark.slow
def test_slices_of_any_size_give_one_text_and_one_trace(small, monkeypatch):
    stack, calls, sliced = mlsd.stack(small), [], generation._slice

    def counted(*arguments):
        calls.append(arguments[-1])
        return sliced(*arguments)

    monkeypatch.setattr(generation, "_slice", counted)
    arguments = {"max_new_tokens": [NEW, 5, 1], "temperature": 0.7, "stop_token_ids": [], "logprobs": True}
    found, traces = [], []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(generation, "SLICE_SECONDS", seconds)
        calls.clear()
        found.append(mlsd.generate(stack, IDS, **arguments))
        traces.append(generation.programs(stack).advance._cache_size())
        assert len(calls) == (NEW if seconds == 0 else 1)
    assert traces[0] == traces[1]
    assert (found[0].tokens, found[0].logprobs) == (found[1].tokens, found[1].logprobs)


def test_a_slice_takes_about_its_time():
    assert generation._next(1, 0.001, 10**9) == 4  # growing by no more than so much
    assert generation._next(64, 0.001, 10**9) == 256
    assert generation._next(64, 0.2, 10**9) == 64
    assert generation._next(64, 0.8, 10**9) == 16
    assert generation._next(1, 30, 10**9) == 1
    assert generation._next(64, 0.001, 16) == 16
    assert generation._first(0.01, 10**9) == 10  # a pass and a draft, each no longer than it took to feed the prompts
    assert generation._first(0.01, 4) == 4
    assert generation._first(30, 10**9) == generation._first(0.09, 10**9) == 1


@pytest.mark.slow
def test_a_long_prompt_is_fed_in_slices(small, monkeypatch):
    monkeypatch.setattr(requests, "PREFILL_WIDTHS", (16,))
    monkeypatch.setattr(generation, "SLICE_SECONDS", 1e9)
    stack, fed = mlsd.stack(small), []
    compiled = generation.programs(stack)

    def counted(*arguments, **pieces):
        fed.append((int(pieces["first"]), int(pieces["pieces"])))
        return compiled.feed(*arguments, **pieces)

    monkeypatch.setattr(generation, "programs", lambda stack: compiled._replace(feed=counted))
    prompts = [np.arange(5, 75).tolist(), [9]]
    out = mlsd.generate(stack, prompts, max_new_tokens=4, stop_token_ids=[])
    assert fed == [(0, 0), (0, 1), (1, 4)]
    monkeypatch.setattr(generation, "SLICE_SECONDS", 0.0)
    assert mlsd.generate(stack, prompts, max_new_tokens=4, stop_token_ids=[]).tokens == out.tokens
    assert fed[3:] == [(0, 0), *((i, 1) for i in range(5))]
    monkeypatch.setattr(requests, "PREFILL_WIDTHS", (128,))
    assert mlsd.generate(stack, prompts, max_new_tokens=4, stop_token_ids=[]).tokens == out.tokens
    assert len(fed) == 3 + 6 + 2  # in one piece


def test_an_interrupt_is_heeded_after_a_slice(small, monkeypatch):
    stack, calls, sliced = mlsd.stack(small), [], generation._slice

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return sliced(*arguments)

    monkeypatch.setattr(generation, "_slice", interrupted)
    monkeypatch.setattr(generation, "SLICE_SECONDS", 0.0)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for run in (mlsd.generate, mlsd.compare):
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                run(stack, IDS, max_new_tokens=[NEW, 5, 1], stop_token_ids=[], logprobs=True)
            assert len(calls) == 3
    finally:
        signal.signal(signal.SIGINT, handler)
