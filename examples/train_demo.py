"""Trains the demonstration checkpoint: a small Llama-shaped model of Python source, from the standard library's own files.

    python examples/train_demo.py --overwrite       # prepares data, trains, writes checkpoints/demo
    python examples/train_demo.py --steps 200 --work work --out demo

Three steps: `demo_data.prepare` (source files -> tokenizer and token files), `train` (token files -> weights), `export` (weights
-> a folder in Hugging Face's format, BF16). Training may be stopped at any time (Ctrl-C, SIGTERM, a crash): the same command
goes on from the last save in the work folder and ends with the same weights as a run never stopped, because the batch of a
step is a pure function of the seed and the step.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from demo_data import END_OF_TEXT, Data, collect, fresh_folder, load_data, prepare, windows, write_json
from rich.console import Console
from safetensors.numpy import save_file

from mlspecqd_jax.transformer import LanguageModel, ModelConfig

EVAL_BATCHES = 16


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What decides the weights, next to the data and the model's shape."""

    batch: int
    window: int
    steps: int
    warmup: int
    learning_rate: float
    weight_decay: float
    seed: int


def random_batch(tokens: np.ndarray, schedule: Schedule, step: int) -> np.ndarray:
    """Return the batch of a step, decided by (seed, step) alone: int32 [B, W + 1]."""
    rng = np.random.default_rng([schedule.seed, step])
    return windows(tokens, rng.integers(0, len(tokens) - schedule.window, schedule.batch), schedule.window)


# --- training -----------------------------------------------------------------------------------------------------------


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


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(model: LanguageModel, params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, in nats, of every next token in tokens [B, W + 1]."""
    logits, _ = model(params, tokens[:, :-1], jnp.zeros(tokens.shape[0], jnp.int32), None)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(model: LanguageModel, schedule: Schedule, state: dict, tokens: jax.Array) -> tuple[dict, jax.Array]:
    """Return (state after one update, loss before it)."""
    loss, gradient = jax.value_and_grad(mean_loss, argnums=1)(model, state["params"], tokens)
    updates, optimizer = make_optimizer(schedule).update(gradient, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer}, loss


def evaluate(model: LanguageModel, params: dict[str, jax.Array], tokens: np.ndarray, schedule: Schedule) -> float:
    """Return the mean loss over EVAL_BATCHES batches of windows spread evenly over a stream."""
    starts = np.linspace(0, len(tokens) - schedule.window - 1, EVAL_BATCHES * schedule.batch).astype(int)
    batches = starts.reshape(EVAL_BATCHES, schedule.batch)
    return float(np.mean([mean_loss(model, params, windows(tokens, b, schedule.window)) for b in batches]))


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


def train(model: LanguageModel, schedule: Schedule, data: Data, folder: Path, options) -> dict[str, jax.Array]:
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


# --- export -------------------------------------------------------------------------------------------------------------


def export(params: dict[str, jax.Array], config: ModelConfig, tokenizer: Path, folder: Path, overwrite: bool) -> None:
    """Write config, BF16 weights and tokenizer as transformers reads them; the folder appears complete or not at all."""
    if folder.exists() and not overwrite:
        raise ValueError(f"--out {folder} exists; add --overwrite to replace it.")
    partial = fresh_folder(folder)
    ours = {"rope_scaling", "qkv_bias", "output_bias", "qk_norm", "sliding_windows"}  # not Hugging Face's, and unused here
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: value for key, value in dataclasses.asdict(config).items() if key not in ours},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    write_json(partial / "config.json", settings)
    write_json(partial / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    arrays = {name: np.asarray(leaf.astype(jnp.bfloat16)) for name, leaf in params.items()}
    save_file(arrays, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "model.safetensors").chmod(0o644)  # save_file makes it readable by its owner alone
    shutil.copyfile(tokenizer, partial / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(partial / "tokenizer_config.json", settings)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


# --- command line -------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Answers a bad argument with one sentence, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    demo = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser("train_demo", description=__doc__.splitlines()[0], formatter_class=shown)
    add = parser.add_argument
    add("--source", type=Path, action="append", help="root folder of .py files, repeatable; else the standard library")
    add("--data", type=Path, help="folder prepared by an earlier run (its work folder's data/), in place of --source")
    add("--work", type=Path, default=cache / "mlspecqd-jax" / "train_demo", help="folder of the prepared data and the saves")
    add("--out", type=Path, default=demo, help="folder to write the model to")
    add("--overwrite", action="store_true", help="replace an existing --out")
    add("--hidden", type=int, default=256, help="hidden size")
    add("--ffn", type=int, default=640, help="intermediate size")
    add("--layers", type=int, default=4, help="decoder layers")
    add("--heads", type=int, default=4, help="query heads")
    add("--kv-heads", type=int, default=2, help="key/value heads")
    add("--vocab", type=int, default=4096, help="vocabulary size")
    add("--positions", type=int, default=1024, help="max_position_embeddings of the exported model")
    add("--batch", type=int, default=4, help="windows a step")
    add("--window", type=int, default=512, help="tokens a window")
    add("--steps", type=int, default=2400, help="steps in all; the learning rate decays over them")
    add("--warmup", type=int, help="steps of linear warm-up; else a twentieth of --steps")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.1, help="of matrices")
    add("--seed", type=int, default=0, help="decides the initial weights and the batches")
    add("--log-every", type=int, default=10, help="steps between progress lines")
    add("--eval-every", type=int, default=200, help="steps between validations")
    add("--save-minutes", type=float, default=3.0, help="minutes between saves")
    add("--stop-at", type=int, help="save and leave after this step, as if interrupted")
    options = parser.parse_args(argv)
    options.source = options.source or [stdlib]
    options.warmup = max(1, options.steps // 20) if options.warmup is None else options.warmup
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is computed."""
    for name in "hidden ffn layers heads kv_heads batch window steps warmup log_every eval_every".split():
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1.")
    for name in ("hidden", "ffn"):
        if getattr(options, name) % 32:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be a multiple of 32, the length of an MX block.")
    if options.hidden % (2 * options.heads):
        raise ValueError(f"--hidden {options.hidden} must divide into {options.heads} heads of an even size.")
    if options.heads % options.kv_heads:
        raise ValueError(f"--heads {options.heads} must be a multiple of --kv-heads {options.kv_heads}.")
    if not 257 <= options.vocab <= 65536:
        raise ValueError(f"--vocab is {options.vocab}; it must be from 257 (the bytes and one more) to 65536.")
    if options.window > options.positions:
        raise ValueError(f"--window {options.window} is more than --positions {options.positions}.")
    if options.warmup >= options.steps:
        raise ValueError(f"--warmup {options.warmup} must be less than --steps {options.steps}.")
    if not (math.isfinite(options.lr) and options.lr > 0):
        raise ValueError(f"--lr is {options.lr}; it must be positive.")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}; it must not be negative.")
    for root in [] if options.data else options.source:
        if not root.is_dir():
            raise ValueError(f"--source {root} is not a folder.")
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"--out {options.out} exists; add --overwrite to replace it.")


def model_of(options: argparse.Namespace) -> LanguageModel:
    """Return the Llama-shaped model that the options describe; its head is its embedding."""
    return LanguageModel(
        ModelConfig(
            vocab_size=options.vocab,
            hidden_size=options.hidden,
            intermediate_size=options.ffn,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            head_dim=options.hidden // options.heads,
            max_position_embeddings=options.positions,
            tie_word_embeddings=True,
        )
    )


def data_of(options: argparse.Namespace) -> tuple[Data, Path]:
    """Return the data of --data, or of --source prepared once into the work folder, and the folder it is in."""
    if options.data:
        return load_data(options.data, options.vocab, options.window), options.data
    folder, sources = options.work / "data", collect(options.source)
    if not folder.exists():
        print(f"preparing {len(sources)} files in {folder}", flush=True)
        prepare(sources, options.vocab, folder)
    data = load_data(folder, options.vocab, options.window)
    if sorted(f["sha256"] for f in data.manifest["files"]) != sorted(s.sha256 for s in sources):
        raise ValueError(f"{folder} was prepared from other files; remove it, or name it with --data to use it as it is.")
    return data, folder


def same_run(work: Path, model: LanguageModel, schedule: Schedule, data: Data) -> None:
    """Record what decides the weights; refuse a work folder that holds saves of another run."""
    shape, when, streams = dataclasses.asdict(model.config), dataclasses.asdict(schedule), data.manifest["streams"]
    run = json.loads(json.dumps({"model": shape, "schedule": when, "data": streams}))  # tuples become lists, as in the file
    path = work / "run.json"
    if not path.exists():
        write_json(path, run)
    elif json.loads(path.read_text()) != run:
        raise ValueError(f"{work} holds a run with other settings (run.json); give another --work, or remove it.")


def main(argv: list[str] | None = None) -> int:
    """Prepare, train, export; return the exit code."""
    options = parse(argv)
    model = model_of(options)
    schedule = Schedule(
        options.batch, options.window, options.steps, options.warmup, options.lr, options.weight_decay, options.seed
    )
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        data, folder = data_of(options)
        same_run(options.work, model, schedule, data)
    except ValueError as error:
        return complain(error)
    try:
        params = train(model, schedule, data, options.work / "saves", options)
    except Stopped as stopped:
        print(stopped)
        return stopped.exit_code
    rounded = {name: leaf.astype(jnp.bfloat16).astype(jnp.float32) for name, leaf in params.items()}
    for split in ("train", "validation"):
        loss = evaluate(model, rounded, getattr(data, split), schedule)
        print(f"{split} loss {loss:.4f} (weights rounded to BF16)")
    try:  # again, since the folder may have been made while training went on
        export(params, model.config, folder / "tokenizer.json", options.out, options.overwrite)
    except ValueError as error:
        return complain(error)
    print(f"wrote {sum(p.size for p in params.values()) / 1e6:.2f} million parameters to {options.out}")
    return 0


def complain(error: ValueError) -> int:
    """Print what is wrong as one sentence; return the exit code for it."""
    print(f"train_demo: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # outside training; what is prepared or saved so far is used next time
        sys.exit(130)
