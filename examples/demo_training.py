"""The demo family's training: token files and a schedule to weights, saved on the way, the same however often it is stopped."""

import contextlib
import dataclasses
import functools
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from demo_data import Data, windows
from rich.console import Console

from mlspecqd_jax.network.network import Network


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What decides the weights, next to the data, the model's shape and the device."""

    batch: int  # windows a step
    window: int  # tokens a window
    steps: int
    long_steps: int  # the last ones of these, of half as many windows of twice the length
    warmup: int
    learning_rate: float
    weight_decay: float
    seed: int
    compute: str  # dtype of the products; weights, their gradients and the optimizer's state are float32

    def windows_at(self, step: int) -> tuple[int, int]:
        """Return (windows, tokens a window) of a step, counted from 0."""
        long = step >= self.steps - self.long_steps
        return (self.batch // 2, self.window * 2) if long else (self.batch, self.window)


def random_batch(tokens: np.ndarray, schedule: Schedule, step: int) -> np.ndarray:
    """Return the batch of a step, decided by (seed, step) alone: int32 [B, W + 1]."""
    batch, window = schedule.windows_at(step)
    rng = np.random.default_rng([schedule.seed, step])
    return windows(tokens, rng.integers(0, len(tokens) - window, batch), window)


def make_optimizer(schedule: Schedule) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to a tenth, clipping by global norm, weight decay on matrices only."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, schedule.learning_rate, schedule.warmup, schedule.steps, end_value=0.1 * schedule.learning_rate
    )
    matrices = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=schedule.weight_decay, mask=matrices),
    )


@functools.partial(jax.jit, static_argnums=(0, 3))
def mean_loss(model: Network, params: dict[str, jax.Array], tokens: jax.Array, compute: str) -> jax.Array:
    """Return the mean cross-entropy, in nats, of every next token in tokens [B, W + 1]."""
    params = jax.tree.map(lambda p: p.astype(compute), params)
    logits, *_ = model(params, tokens[:, :-1], jnp.zeros(tokens.shape[0], jnp.int32), None)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(model: Network, schedule: Schedule, state: dict, tokens: jax.Array) -> tuple[dict, jax.Array]:
    """Return (state after one update, loss before it)."""
    loss, gradient = jax.value_and_grad(mean_loss, argnums=1)(model, state["params"], tokens, schedule.compute)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps as integers and multiplies them by its rates
        updates, optimizer = make_optimizer(schedule).update(gradient, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer}, loss


def evaluate(model: Network, params, tokens: np.ndarray, schedule: Schedule, step: int = 0, batches: int = 16) -> float:
    """Return the mean loss over batches, of the shape that a step has, of windows spread evenly over a stream."""
    batch, window = schedule.windows_at(step)
    starts = np.linspace(0, len(tokens) - window - 1, batches * batch).astype(int).reshape(batches, batch)
    return float(np.mean([mean_loss(model, params, windows(tokens, s, window), schedule.compute) for s in starts]))


class Stopped(Exception):
    """Training was saved at `step` and left; `number` is the signal that asked for it, or None."""

    def __init__(self, step: int, number: int | None):
        super().__init__(f"stopped and saved at step {step}; the same command goes on from there.")
        self.exit_code = 0 if number is None else 128 + number


@contextlib.contextmanager
def caught_signals():
    """Yield a list to which SIGINT and SIGTERM, while inside, only append their number."""
    caught = []
    previous = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(model: Network, schedule: Schedule, data: Data, folder: Path, options) -> dict[str, jax.Array]:
    """Return the parameters after all steps, going on from the last save in `folder`.

    Raises:
      Stopped: SIGINT or SIGTERM came, or `options.stop_at` was reached; everything so far is saved.
    """
    params = model.init(schedule.seed)
    state = {"params": params, "optimizer": make_optimizer(schedule).init(params)}
    keep = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    console = Console()
    with (
        caught_signals() as signals,
        ocp.CheckpointManager(folder.resolve(), options=keep) as manager,
        console.status("compiling") as status,
    ):
        step = manager.latest_step() or 0
        if step:
            state = manager.restore(step, args=ocp.args.StandardRestore(jax.eval_shape(lambda: state)))
            console.print(f"going on from step {step} of {schedule.steps}")
        saved, since, losses = time.monotonic(), time.monotonic(), []
        while step < schedule.steps:
            state, loss = train_step(model, schedule, state, random_batch(data.train, schedule, step))
            losses.append(loss)
            step += 1
            last = step == schedule.steps
            if step % options.log_every == 0 or last:
                line = progress(step, schedule, losses, since)
                status.update(line) if console.is_terminal else print(line, flush=True)
                since, losses = time.monotonic(), []
            if step % options.eval_every == 0 and not last:
                loss = evaluate(model, state["params"], data.validation, schedule)
                console.print(f"step {step}  validation loss {loss:.4f}")
                since, losses = time.monotonic(), []
            stop = signals or step == options.stop_at
            if stop or last or time.monotonic() - saved > 60 * options.save_minutes:
                manager.save(step, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()  # the next step overwrites these buffers
                saved = time.monotonic()
            if stop and not last:
                raise Stopped(step, signals[0] if signals else None)
    return state["params"]


def progress(step: int, schedule: Schedule, losses: list[jax.Array], since: float) -> str:
    """Return the line that says how far training is, over the steps since the last one."""
    loss = float(np.mean([float(x) for x in losses]))  # waits for the steps, so the clock is read after it
    seconds = time.monotonic() - since
    left = int((schedule.steps - step) * seconds / len(losses))
    speed = len(losses) * schedule.batch * schedule.window / seconds
    return f"step {step}/{schedule.steps}  loss {loss:.4f}  {speed:.0f} tokens/s  {left // 60}:{left % 60:02d} left"
