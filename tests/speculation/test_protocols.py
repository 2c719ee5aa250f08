"""What users write: a drafter and a scorer of their own, and what they are told where these return something else."""

import dataclasses
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mlspecqd_jax as mlsd
from mlspecqd_jax.speculation.level import Level

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "own_drafter.py"
V, STEPS = 7, 12


@dataclasses.dataclass(frozen=True)
class Counting:
    """A `Scorer` that is no network: token t is followed by (t + params) mod V."""

    vocab_size: int = V
    dtype: Any = jnp.float32
    extra: int = 0  # positions too many

    def init_cache(self, batch, length, params):
        return jnp.zeros((batch, length), jnp.int32)

    def __call__(self, params, tokens, start, cache):
        logits = 9 * jax.nn.one_hot((tokens + params) % V, V, dtype=self.dtype)
        return jnp.pad(logits, ((0, 0), (0, self.extra), (0, 0))), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constant:
    """A `Drafter` that proposes token 3, or what `change` makes of that draft."""

    must_follow = False
    change: Any = dataclasses.field(metadata={"static": True}, default=None)

    def init(self, prompts, prefill_width):
        return None

    def propose(self, state, cache, sequences, sampling, draft_len, wanted, depth, refeed):
        tokens = jnp.full((wanted.shape[0], draft_len), 3, jnp.int32)
        draft = mlsd.Draft.certain(tokens, wanted, sampling)
        return self.change(draft) if self.change else draft, state, cache


def generated(stack, rule="coupled"):
    """Return the tokens of two rows after STEPS new ones each."""
    tokens = jnp.zeros((2, mlsd.buffer_length(STEPS + 2)), jnp.int32).at[1, :2].set(jnp.array([1, 2]))
    length = jnp.array([1, 2])
    sampling = mlsd.Sampling.create(2, V, rule=rule)
    out, end, state = mlsd.generate_tokens(stack, tokens, length, length + STEPS, sampling)
    return [out[r, : end[r]].tolist() for r in range(2)], state


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_a_whole_generation_on_a_scorer_that_is_no_network(rule):
    inner = Level(Counting(), jnp.int32(1), Constant(), 2)
    rows, state = generated(Level(Counting(), jnp.int32(1), inner, 4), rule)
    assert rows == [[t % V for t in range(STEPS + 1)], [t % V for t in range(1, STEPS + 3)]]
    assert int(state.counts.accepted.sum()) == int(state.counts.judged.sum()) > STEPS  # its draft is itself
    rows, _ = generated(Level(Counting(), jnp.int32(1), Level(Counting(), jnp.int32(2)), 3), rule)
    assert rows[0] == [t % V for t in range(STEPS + 1)]  # a draft that is wrong throughout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d._replace(tokens=d.tokens[:, :1]), r"returned tokens int32 \[2, 1\], but must return int32 \[2, 3\]"),
        (lambda d: d._replace(tokens=d.tokens.astype(jnp.float32)), r"tokens float32 \[2, 3\], but must return int32 \[2, 3\]"),
        (lambda d: d._replace(length=jnp.int32(3)), r"length int32 \[\], but must return int32 \[2\]"),
        (lambda d: d._replace(probs=None), r"probs NoneType, but must return float32 \[2, 3, 7\]"),
        (tuple, r"returned tuple first, but must return \(Draft, state, cache\)"),
    ],
)
def test_a_drafter_that_returns_something_else_is_told_what_is_needed(change, message):
    with pytest.raises(mlsd.InputError, match=f"Constant.propose .*{message}"):
        generated(Level(Counting(), jnp.int32(1), Constant(change), 3), "rejection")


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (Counting(extra=1), r"Counting returned logits float32 \[2, 2, 7\], but must return float32 \[2, 1, 7\]"),
        (Counting(dtype=jnp.bfloat16), r"logits bfloat16 \[2, 1, 7\], but must return float32 \[2, 1, 7\]"),
    ],
)
def test_a_scorer_that_returns_something_else_is_told_what_is_needed(scorer, message):
    with pytest.raises(mlsd.InputError, match=message):
        generated(Level(scorer, jnp.int32(1)))


def test_the_example_of_an_own_drafter():
    """It is short, runs as it is, and prints what plain decoding gives."""
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 40
    printed = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True).stdout
    plain = mlsd.generate(mlsd.stack(mlsd.load("demo")), "def mul(a, b):", max_new_tokens=48)
    assert printed == plain.text[0] + "\n"
