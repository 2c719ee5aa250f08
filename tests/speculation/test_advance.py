"""The state between calls: rounds by hand, in pieces and resumed are one, and what is forgotten is heard."""

import jax
import jax.numpy as jnp
import numpy as np
from loops import (
    PENALIZED,
    PROMPTS,
    B,
    G,
    S,
    generate,
    jit_advance,
    jit_init,
    jit_step,
    plain,
    prompts_of,
    sampling_of,
    script,
    table,
    toy,
)
from oracles import decode_oracle
from toys import EMPTY, level, logprob_rows, rows, run

from mlspecqd_jax.speculation.loop import finished


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_step_advance_and_generate_tokens_are_one():
    sampling = sampling_of(seed=2, temperature=1, stop_token_ids=[6])
    limits = jnp.asarray([25, 30, 12, 50, 50, 20], jnp.int32)
    stack = level(toy, table, script(generate(plain, limits, sampling)[0], "mostly"), G)
    tokens, length, whole = run(stack, *prompts_of(), limits, sampling)
    assert same((tokens, length), (whole.tokens, whole.length))

    begun = jit_init(stack, *prompts_of(), sampling)
    by_hand, steps = begun, 0
    while not finished(by_hand, limits).all():
        by_hand, steps = jit_step(stack, by_hand, limits, sampling), steps + 1
    assert same(by_hand, whole)
    assert steps == whole.counts.passes

    in_pieces = begun
    for rounds in [2, 0, 1, 3, 100]:
        before = in_pieces
        in_pieces = jit_advance(stack, in_pieces, limits, sampling, rounds)
        assert in_pieces.counts.passes - before.counts.passes == min(rounds, steps - before.counts.passes)
    assert same(in_pieces, whole)
    assert same(jit_advance(stack, begun, limits, sampling, 2**31 - 1), whole)

    # A round more changes nothing but the number of passes.
    more = jit_step(stack, whole, limits, sampling)
    assert rows(more.tokens, more.length) == rows(whole.tokens, whole.length)
    assert logprob_rows(more) == logprob_rows(whole)
    assert same(more.counts._replace(by_rows=0), whole.counts._replace(by_rows=0))


def test_resuming_with_a_higher_limit_and_with_other_sampling():
    sampling = sampling_of(seed=2, temperature=[0, 1, 1, 2, 0.5, 1], **PENALIZED)
    first, then = (jnp.full((B,), n, jnp.int32) for n in (22, 41))
    truth, _ = generate(plain, then, sampling)
    stack = level(toy, table, script(truth, "mostly"), G)
    begun = jit_init(stack, *prompts_of(), sampling)
    half = jit_advance(stack, begun, first, sampling, 100)
    assert half.length.tolist() == [22] * B
    resumed = jit_advance(stack, half, then, sampling, 100)
    assert rows(resumed.tokens, resumed.length) == truth

    warm = sampling_of(seed=9, temperature=1.5, top_k=5)
    resumed = jit_advance(stack, half, then, warm, 100)
    halves = rows(half.tokens, half.length)
    assert rows(resumed.tokens, resumed.length) == decode_oracle(toy, table, halves, [41] * B, warm, S)[0]


def test_an_ended_row_stays_ended():
    sampling = sampling_of(seed=2, temperature=1, stop_token_ids=[6, 1])
    truth, _ = generate(plain, [50] * B, sampling)
    stack = level(toy, table, script(truth, "mostly"), G)
    limits = jnp.full((B,), 50, jnp.int32)
    state = jit_advance(stack, jit_init(stack, *prompts_of(), sampling), limits, sampling, 100)
    assert state.ended.any()
    more = jit_advance(stack, state, limits + 10, sampling, 100)
    for r in np.flatnonzero(state.ended):
        assert rows(more.tokens, more.length)[r] == truth[r]


def test_reading_an_unwritten_entry_is_heard():
    """The toy does what the other tests rely on: a forgotten prompt shows."""
    sampling = sampling_of()
    limits = jnp.full((B,), 30, jnp.int32)
    stack = level(toy, table, script(PROMPTS, "wrong"), G)
    begun = jit_init(stack, *prompts_of(), sampling)
    forgotten = begun._replace(cache=jnp.full_like(begun.cache, EMPTY))
    out = jit_advance(stack, forgotten, limits, sampling, 100)
    assert all(
        toy.alarm in row[len(prompt) :]
        for row, prompt in zip(rows(out.tokens, out.length), PROMPTS, strict=True)
        if len(prompt) > 1
    )
    stale = begun._replace(cache=jnp.where(jnp.arange(S) == 0, begun.cache + 1, begun.cache))
    out, good = (jit_advance(stack, state, limits, sampling, 100) for state in (stale, begun))
    changed = [a != b for a, b in zip(rows(out.tokens, out.length), rows(good.tokens, good.length), strict=True)]
    assert changed == [len(prompt) > 1 for prompt in PROMPTS]  # a row of one token writes its entry in the first round
