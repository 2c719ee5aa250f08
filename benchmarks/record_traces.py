"""Record what a target writes, and what its drafts would choose from every place of that, for tests that play it back.

    python benchmarks/record_traces.py OUT.npz NAME=MODEL[,SMALL] ... --prompts F [F ...] [--rows R] [--new N]

Of each model its MXFP4 twin is recorded, greedy and at temperature 0.8 (sets NAME-0 and NAME-0.8): from each of the N places of a
text on, the twin's next G choices on the target's own cache, whether they are what the target wrote, and by which class of lead; of
a small draft the choice for each place of the text. `tests/players.py` plays the file.
"""

import argparse
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import prompts as prompt_files

import mlspecqd_jax as mlsd
from mlspecqd_jax.generation import compiled, prefilled
from mlspecqd_jax.programs import programs
from mlspecqd_jax.requests import request
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.guide import CLASSES, Guide
from mlspecqd_jax.speculation.protocols import Ask, Lent, Sequences
from mlspecqd_jax.speculation.state import rolled_back

G = 16
PROMPT_TOKENS = 48  # of each prompt, the last


def patient(batch: int) -> Guide:
    """Return a guide to which drafts are free."""
    free = jnp.zeros((2, SLACK + 1))
    ones = jnp.ones((2, 2, batch))
    return Guide(
        times=free,
        accept=jnp.ones((2, 2, batch, CLASSES)) * 0.5,
        mean=0.5 * ones,
        pace=jnp.ones((2, 2)) * jnp.asarray([[1.0, 0.0]]),
        weight=jnp.full((batch,), 1 / batch),
        worth=jnp.float32(1),
        after=free[0],
        room=jnp.float32(jnp.inf),
        retry=jnp.bool_(False),
    )


@functools.partial(jax.jit, static_argnames="draft_len")
def choices(level, state, cache, tokens, length, sampling, draft_len):
    """Return what a drafter proposes after `length` tokens, and the classes: int32 [B, G] twice."""
    batch = len(length)
    ask = Ask(
        Sequences(tokens, length),
        jnp.full((batch,), draft_len, jnp.int32),
        jnp.zeros((0, batch), jnp.int32),
        Lent(cache, None, length - 1),
        draft_len,
        1,
        length - 1,
        0,
        patient(batch),
    )
    draft, state, _ = level.propose(rolled_back(state, length - 1), ask, sampling)
    return draft.tokens, draft.classes, state


def drawn(model, draft, draft_len, prompts, new, temperature):
    """Return the target's text [B, S], prompt lengths, and the drafts [B, new, draft_len] from each place, with classes."""
    stack = mlsd.stack(model, (draft, draft_len))
    settings = {
        "temperature": temperature,
        "seed": 11,
        "stop_token_ids": (),
        "max_new_tokens": new + draft_len + 1,
        "draft_limit": 0,
    }
    asked = request(stack, prompts, settings)
    state = prefilled(stack, compiled(stack, asked)[0], asked.batch)
    state = programs(stack).advance(stack, state, np.array(asked.batch.limit), asked.sampling, np.int32(10**6))
    sampling = dataclasses.replace(asked.sampling, prompt_length=state.begin)
    below, found = state.below, []
    for place in range(new):
        length = state.begin + place
        tokens, classes, below = choices(stack.level.drafter, below, state.cache, state.tokens, length, sampling, draft_len)
        found.append((np.asarray(tokens), np.asarray(classes)))
    proposals, classes = (np.stack([pair[i] for pair in found], axis=1) for i in (0, 1))
    return np.asarray(state.tokens), np.asarray(state.begin), proposals, classes


def record(model, small, prompts, new, temperature):
    """Return the arrays of a set."""
    text, begin, twin, twin_class = drawn(model, model.quantized(), G, prompts, new, temperature)
    place = begin[:, None, None] + np.arange(new)[None, :, None] + np.arange(G)[None, None, :]
    hit = twin == text[np.arange(len(text))[:, None, None], place]
    end = int(begin.max()) + new + G
    arrays = {
        "text": text[:, :end].astype(np.uint16),
        "begin": begin.astype(np.uint16),
        "hit": np.packbits(hit),
        "twin": twin_class,
    }
    if small is not None:
        again, _, choice, small_class = drawn(model, small, 1, prompts, new, temperature)
        assert all(np.array_equal(a[b : b + new], t[b : b + new]) for a, t, b in zip(again, text, begin, strict=True))
        arrays |= {"small": choice[..., 0].astype(np.uint16), "small_class": small_class[..., 0].astype(np.uint8)}
    arrays["twin"] = twin_class.astype(np.uint8)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL[,SMALL]")
    parser.add_argument("--prompts", nargs="+", type=pathlib.Path, required=True, help="files of prompts, see prompts.py")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--new", type=int, default=96)
    options = parser.parse_args()
    arrays = {}
    for spec in options.models:
        name, _, folders = spec.partition("=")
        model, *small = (mlsd.load(folder) for folder in folders.split(","))
        prompts = [ids[-PROMPT_TOKENS:] for ids in prompt_files.read(options.prompts, options.rows, 40, model.tokenizer)]
        for temperature in (0.0, 0.8):
            found = record(model, small[0] if small else None, prompts, options.new, temperature)
            arrays |= {f"{name}-{temperature:g}/{key}": value for key, value in found.items()}
            hits = np.unpackbits(found["hit"])[: found["twin"].size].reshape(found["twin"].shape)
            print(f"{name}-{temperature:g}: {hits[:, :, 0].mean():.3f} of first tokens are the target's")
    np.savez_compressed(options.out, **arrays)
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
