"""What users write: a drafter, a scorer and a control of their own, and what they are told where these return something else."""

import dataclasses
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import run

import mlspecqd_jax as mlsd
from mlspecqd_jax.speculation.buffers import write_at
from mlspecqd_jax.speculation.level import Level

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "own_drafter.py"
V, STEPS = 7, 12


@dataclasses.dataclass(frozen=True)
class Counting:
    """A `Scorer` that is no network: token t is followed by (t + params) mod V."""

    vocab_size: int = V
    dtype: Any = jnp.float32
    extra: int = 0  # positions too many
    change: Any = None  # what is made of what it returns

    def init_cache(self, params, batch, slots):
        return jnp.zeros((batch, slots), jnp.int32)

    def row_multiple(self, params):
        return 1

    def __call__(self, params, tokens, start, cache, *, features=False):
        logits = 9 * jax.nn.one_hot((tokens + params) % V, V, dtype=self.dtype)
        found = jnp.stack([tokens, start[:, None] + jnp.arange(tokens.shape[1])[None, :]], axis=-1)  # [B, W, 2]
        scored = mlsd.Scored(jnp.pad(logits, ((0, 0), (0, self.extra), (0, 0))), cache, found if features else None)
        return self.change(scored) if self.change else scored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constant:
    """A `Drafter` that proposes token 3, or what `change` makes of that draft."""

    name = "constant"
    must_follow = False
    uses_features: bool = dataclasses.field(metadata={"static": True}, default=False)
    change: Any = dataclasses.field(metadata={"static": True}, default=None)

    def init(self, batch, slots):
        return None

    def feed(self, state, tokens, start, lent):
        return None

    def propose(self, state, ask, sampling):
        tokens = jnp.full((ask.wanted.shape[0], ask.draft_len), 3, jnp.int32)
        proposal = mlsd.Draft.certain(tokens, ask.wanted, sampling), state, ask.lent
        return self.change(*proposal) if self.change else proposal


def generated(stack, rule="coupled"):
    """Return the tokens of two rows after STEPS new ones each."""
    tokens = jnp.zeros((2, mlsd.buffer_length(STEPS + 2)), jnp.int32).at[1, :2].set(jnp.array([1, 2]))
    length = jnp.array([1, 2])
    sampling = mlsd.Sampling.create(2, V, rule=rule)
    out, end, state = run(stack, tokens, length, length + STEPS, sampling, prefill_width=4)
    return [out[r, : end[r]].tolist() for r in range(2)], state


@pytest.mark.parametrize("rule", [pytest.param("coupled", marks=pytest.mark.slow), "rejection"])
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
        (
            lambda d, *rest: (d._replace(tokens=d.tokens[:, :1]), *rest),
            r"returned tokens int32 \[2, 1\], but must return int32 \[2, 3\]",
        ),
        (
            lambda d, *rest: (d._replace(tokens=d.tokens.astype(jnp.float32)), *rest),
            r"tokens float32 \[2, 3\], but must return int32 \[2, 3\]",
        ),
        (lambda d, *rest: (d._replace(length=jnp.int32(3)), *rest), r"length int32 \[\], but must return int32 \[2\]"),
        (lambda d, *rest: (d._replace(probs=None), *rest), r"probs NoneType, but must return float32 \[2, 3, 7\]"),
        (lambda d, *rest: (tuple(d), *rest), r"returned \(tuple, NoneType, Lent\), but must return \(Draft, state, Lent\)"),
        (lambda d, state, lent: (d, lent), r"returned \(Draft, Lent\), but must return \(Draft, state, Lent\)"),
        (lambda d, state, lent: (d, state, lent.cache), r"last, but must return \(Draft, state, Lent\): hand ask.lent back"),
        (lambda d, state, lent: d, r"returned Draft, but must return \(Draft, state, Lent\)"),
    ],
)
def test_a_drafter_that_returns_something_else_is_told_what_is_needed(change, message):
    with pytest.raises(mlsd.InputError, match=f"Constant.propose .*{message}"):
        generated(Level(Counting(), jnp.int32(1), Constant(change=change), 3), "rejection")


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (Counting(extra=1), r"Counting returned logits float32 \[2, 5, 7\], but must return float32 \[2, 4, 7\]"),
        (
            Counting(change=lambda scored: scored.logits),
            r"Counting returned \w*Tracer, but must return Scored\(logits, cache, features\)",
        ),
        (Counting(dtype=jnp.bfloat16), r"logits bfloat16 \[2, 4, 7\], but must return float32 \[2, 4, 7\]"),
    ],
)
def test_a_scorer_that_returns_something_else_is_told_what_is_needed(scorer, message):
    with pytest.raises(mlsd.InputError, match=message):
        generated(Level(scorer, jnp.int32(1)))


def test_features_that_are_asked_for_and_missing_are_told():
    forgetful = Counting(change=lambda scored: scored._replace(features=None))
    with pytest.raises(mlsd.InputError, match=r"returned features NoneType, but its drafter uses features: return \[2, 3, 'F'\]"):
        generated(Level(forgetful, jnp.int32(1), Constant(uses_features=True), 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """A `Drafter` that remembers what it is lent: the features [B, S, 2] of its verifier, by position, 0 where it has none."""

    name, must_follow, uses_features = "head", True, True

    def init(self, batch, slots):
        return jnp.zeros((batch, slots, 2), jnp.int32)

    def feed(self, state, tokens, start, lent):
        return write_at(state, lent.start, lent.features)

    def propose(self, state, ask, sampling):
        tokens, length = ask.sequences
        state = write_at(state, ask.lent.start, ask.lent.features)
        last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
        proposed = (last + 1 + jnp.arange(ask.draft_len)[None, :]) % V
        return mlsd.Draft.certain(proposed, ask.wanted, sampling), state, ask.lent


@pytest.mark.parametrize("twin", [False, True], ids=["under the target", "under its twin"])
def test_a_drafter_is_lent_the_features_of_its_verifier(twin):
    """Law 3: those of the prompts by `feed`, those of the last pass with what it is asked; each where its token is."""
    drafter = Head()
    if twin:
        drafter = Level(Counting(), jnp.int32(1), drafter, 2, share_cache=True)
    rows, state = generated(Level(Counting(), jnp.int32(1), drafter, 3))
    assert rows[0] == [t % V for t in range(STEPS + 1)]
    found = np.asarray(state.below.below if twin else state.below)
    for r, row in enumerate(rows):
        fed = len(row) - 5  # what the last round scored is lent in the next
        right = [found[r, t].tolist() == [row[t], t] for t in range(1, fed)]
        assert all(right) or twin
        # A twin on its verifier's cache never runs the last token that it drafts, so it has nothing to lend of it.
        missing = [t for t in range(1, fed) if not right[t - 1]]
        assert all(found[r, t].tolist() in ([mlsd.PADDING, t], [0, 0]) for t in missing)
        assert len(missing) <= fed // 3


@pytest.mark.slow
def test_a_window_is_padded_with_minus_one():
    """Contract C13: beyond the draft, in rows that are finished, and beyond the prompts."""
    fed = []

    def record(start, tokens):
        fed.append((start.tolist(), tokens.tolist()))

    @dataclasses.dataclass(frozen=True)
    class Recording(Counting):
        def __call__(self, params, tokens, start, cache, *, features=False):
            jax.debug.callback(record, start, tokens, ordered=True)
            return super().__call__(params, tokens, start, cache, features=features)

    stack = Level(Recording(), jnp.int32(1), Constant(), 2, window_multiple=4)
    tokens, length = jnp.full((2, 256), 6).at[:, :3].set(jnp.array([[1, 6, 6], [1, 2, 3]])), jnp.array([1, 3])
    control = mlsd.Fixed.create(2, draft_limit=[0, 2])
    mlsd.generate_tokens(
        stack, tokens, length, length + jnp.array([1, 4]), mlsd.Sampling.create(2, V), control=control, prefill_width=4
    )
    jax.effects_barrier()
    assert fed[0] == ([0, 0], [[-1, -1, -1, -1], [1, 2, -1, -1]])
    assert fed[1] == ([0, 2], [[1, -1, -1, -1], [3, 3, 3, -1]])
    assert fed[2] == ([1, 3], [[-1, -1, -1, -1], [4, 3, 3, -1]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alternating:
    """A `Control` that lets the target's drafter draft in every second round, and those below it one token."""

    def init(self, draft_lens, batch):
        return jnp.zeros((), jnp.int32), jnp.zeros((len(draft_lens), batch), jnp.int32)

    def limits(self, state):
        return state[1].at[0].set(3 * (state[0] % 2)).at[1:].set(1)

    def guide(self, state, left):
        return None

    def update(self, state, counts):
        return counts[0].passes, state[1]


def test_a_control_of_ones_own_decides_what_is_drafted():
    """Contract C12."""
    inner = Level(Counting(), jnp.int32(1), Level(Counting(), jnp.int32(1)), 2)
    stack, sampling = Level(Counting(), jnp.int32(1), inner, 4), mlsd.Sampling.create(1, V)
    tokens, length = jnp.zeros((1, 256), jnp.int32), jnp.array([1])
    out, _, state = run(stack, tokens, length, length + 10, sampling, control=Alternating())
    assert out[0, :11].tolist() == [t % V for t in range(11)]
    assert [state.counts.passes, state.counts.drafted[0]] == [4, 6]  # rounds of 1, 4, 1 and 4 tokens
    # Twice two for three tokens, the third of which has no draft, and one to catch up with two that were appended meanwhile.
    assert [state.below.counts.passes, state.below.counts.drafted[0]] == [5, 2]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (jnp.zeros((1, 2), jnp.int32), r"Wrong.limits returned int32 \[1, 2\], but must return int32 \[1, 1\]"),
        (jnp.zeros((1, 1)), r"Wrong.limits returned float32 \[1, 1\], but must return int32 \[1, 1\]"),
        (None, r"Wrong.limits returned NoneType, but must return int32 \[1, 1\]"),
    ],
)
def test_a_control_that_returns_something_else_is_told_what_is_needed(limits, message):
    class Wrong(Alternating):
        def limits(self, state):
            return limits

    stack, sampling = Level(Counting(), jnp.int32(1), Constant(), 4), mlsd.Sampling.create(1, V)
    control = jax.tree_util.register_dataclass(Wrong)()
    with pytest.raises(mlsd.InputError, match=message):
        run(stack, jnp.zeros((1, 256), jnp.int32), jnp.array([1]), jnp.array([5]), sampling, control=control)


def test_what_is_no_control_is_refused():
    tokens, sampling = jnp.zeros((1, 256), jnp.int32), mlsd.Sampling.create(1, V)
    with pytest.raises(mlsd.InputError, match="control is 3, but must have init, limits, guide and update"):
        mlsd.init(Level(Counting(), jnp.int32(1)), tokens, jnp.array([1]), sampling, control=3)


@pytest.mark.slow
def test_the_example_of_an_own_drafter():
    """It is short, runs as it is, and prints what plain decoding gives."""
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 40
    printed = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True).stdout
    plain = mlsd.generate(mlsd.stack(mlsd.load("demo")), "def mul(a, b):", max_new_tokens=48)
    assert printed == plain.text[0] + "\n"
