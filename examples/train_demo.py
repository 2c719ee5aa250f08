"""Trains the demonstration family: small Llama-shaped models of Python source, from files that are installed with this project.

    python examples/train_demo.py demo --overwrite             # prepares the data, trains, writes checkpoints/demo
    python examples/train_demo.py demo-small --overwrite       # on the same data
    python examples/train_demo.py demo --steps 200 --work work --out demo

Three steps: `demo_data.prepare` (source files -> tokenizer and token files, once for the family), `demo_training.train` (token
files -> weights), `export` (weights -> a folder in Hugging Face's format, BF16). Training may be stopped at any time (Ctrl-C,
SIGTERM, a crash): the same command goes on from the last save in the work folder and ends with the same weights as a run never
stopped, because the batch of a step is a pure function of the seed and the step.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from demo_data import END_OF_TEXT, Data, fresh_folder, load_data, prepare, same_files, write_json
from demo_sources import PACKAGES, Origin, folder, package, standard_library, without_duplicates
from demo_training import Schedule, Stopped, evaluate, train
from safetensors.numpy import save_file

from mlspecqd_jax.network.families import config_of
from mlspecqd_jax.network.network import Network

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlspecqd-jax"
SHAPES = {
    "demo": {"hidden": 384, "ffn": 1024, "layers": 4, "heads": 6, "kv_heads": 2, "lr": 1.5e-3},
    "demo-small": {"hidden": 96, "ffn": 256, "layers": 2, "heads": 3, "kv_heads": 1, "lr": 3e-3},
}
FINAL_BATCHES = 64  # of the losses printed at the end


# --- export -------------------------------------------------------------------------------------------------------------


def export(params: dict[str, jax.Array], shape: dict, tokenizer: Path, folder: Path, overwrite: bool) -> None:
    """Write config, BF16 weights and tokenizer as transformers reads them; the folder appears complete or not at all."""
    if folder.exists() and not overwrite:
        raise ValueError(f"--out {folder} exists; add --overwrite to replace it.")
    partial = fresh_folder(folder)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
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
        "model_max_length": shape["max_position_embeddings"],
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
    """Read the command line; the model's name gives the defaults of its shape."""
    parser = Parser("train_demo", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("name", choices=SHAPES, help="which model; it decides the defaults of its shape and folders")
    add("--data", type=Path, default=CACHE / "demo_data", help="folder of the prepared data; made where there is none")
    add("--source", type=Path, action="append", help="root of .py files to prepare, repeatable; else Python and named packages")
    add("--work", type=Path, help="folder of the saves; else one by the model's name in the user's cache")
    add("--out", type=Path, help="folder to write the model to; else one by its name in checkpoints/")
    add("--overwrite", action="store_true", help="replace an existing --out")
    add("--hidden", type=int, help="hidden size")
    add("--ffn", type=int, help="intermediate size")
    add("--layers", type=int, help="decoder layers")
    add("--heads", type=int, help="query heads")
    add("--kv-heads", type=int, help="key/value heads")
    add("--vocab", type=int, default=8192, help="vocabulary size")
    add("--positions", type=int, default=1024, help="max_position_embeddings of the exported model")
    add("--batch", type=int, default=4, help="windows a step")
    add("--window", type=int, default=512, help="tokens a window")
    add("--steps", type=int, default=4000, help="steps in all; the learning rate decays over them")
    add("--long-steps", type=int, help="the last ones, of half as many windows twice as long; else a quarter of --steps")
    add("--warmup", type=int, help="steps of linear warm-up; else a twentieth of --steps")
    add("--lr", type=float, help="peak learning rate")
    add("--weight-decay", type=float, default=0.1, help="of matrices")
    add("--seed", type=int, default=0, help="decides the initial weights and the batches")
    add("--compute", choices=("float32", "bfloat16"), help="dtype of the products; else float32 on CPU, bfloat16 elsewhere")
    add("--log-every", type=int, default=10, help="steps between progress lines")
    add("--eval-every", type=int, default=200, help="steps between validations")
    add("--save-minutes", type=float, default=3.0, help="minutes between saves")
    add("--stop-at", type=int, help="save and leave after this step, as if interrupted")
    options = parser.parse_args(argv)
    fill_in(options)
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def fill_in(options: argparse.Namespace) -> None:
    """Set the options whose defaults depend on others."""
    defaults = SHAPES[options.name] | {
        "work": CACHE / f"train_{options.name}",
        "out": CHECKPOINTS / options.name,
        "warmup": max(1, options.steps // 20),
        "long_steps": options.steps // 4,
        "compute": "float32" if jax.default_backend() == "cpu" else "bfloat16",
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


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
    if not 0 <= options.long_steps <= options.steps:
        raise ValueError(f"--long-steps is {options.long_steps}; it must be from 0 to --steps {options.steps}.")
    if options.long_steps and options.batch % 2:
        raise ValueError(f"--batch is {options.batch}; it must be even for --long-steps.")
    if options.window * (2 if options.long_steps else 1) > options.positions:
        raise ValueError(f"--window {options.window}, doubled in the last steps, is more than --positions {options.positions}.")
    if options.warmup >= options.steps:
        raise ValueError(f"--warmup {options.warmup} must be less than --steps {options.steps}.")
    if not (math.isfinite(options.lr) and options.lr > 0):
        raise ValueError(f"--lr is {options.lr}; it must be positive.")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}; it must not be negative.")
    for root in options.source or []:
        if not root.is_dir():
            raise ValueError(f"--source {root} is not a folder.")
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"--out {options.out} exists; add --overwrite to replace it.")


def shape_of(options: argparse.Namespace) -> dict:
    """Return the shape of the model that the options describe, by the keys of a Llama's config.json; its head is its embedding."""
    return {
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "intermediate_size": options.ffn,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.hidden // options.heads,
        "max_position_embeddings": options.positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }


def model_of(options: argparse.Namespace) -> Network:
    """Return the model that the options describe."""
    return Network(config_of("llama", **shape_of(options)))


def schedule_of(options: argparse.Namespace) -> Schedule:
    """Return the schedule that the options describe."""
    names = {"learning_rate": "lr"}
    return Schedule(**{f.name: getattr(options, names.get(f.name, f.name)) for f in dataclasses.fields(Schedule)})


def origins_of(options: argparse.Namespace) -> list[Origin]:
    """Return what the data is prepared from."""
    if options.source:
        return without_duplicates(map(folder, options.source))
    return without_duplicates([standard_library(), *map(package, PACKAGES)])


def data_of(options: argparse.Namespace) -> Data:
    """Return the data in the folder of --data, prepared there first where there is none."""
    made = options.data.exists()
    origins = None if made and not options.source else origins_of(options)
    if not made:
        print(f"preparing {sum(len(o.sources) for o in origins)} files in {options.data}", flush=True)
        prepare(origins, options.vocab, options.data)
    data = load_data(options.data, options.vocab, options.window * (2 if options.long_steps else 1))
    if origins and not same_files(data.manifest, origins):
        raise ValueError(f"{options.data} was prepared from other files; leave --source out, or name a new --data.")
    return data


def same_run(work: Path, shape: dict, schedule: Schedule, data: Data) -> None:
    """Record what decides the weights; refuse a work folder that holds saves of another run."""
    when, streams = dataclasses.asdict(schedule), data.manifest["streams"]
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
    schedule = schedule_of(options)
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        data = data_of(options)
        same_run(options.work, shape_of(options), schedule, data)
    except ValueError as error:
        return complain(error)
    try:
        params = train(model, schedule, data, options.work / "saves", options)
    except Stopped as stopped:
        print(stopped)
        return stopped.exit_code
    rounded = {name: leaf.astype(jnp.bfloat16).astype(jnp.float32) for name, leaf in params.items()}
    for split in ("train", "validation"):
        for step in (0, schedule.steps - 1):
            loss = evaluate(model, rounded, getattr(data, split), schedule, step, FINAL_BATCHES)
            print(f"{split} loss {loss:.4f} on windows of {schedule.windows_at(step)[1]} (weights rounded to BF16)")
    try:  # again, since the folder may have been made while training went on
        export(params, shape_of(options), options.data / "tokenizer.json", options.out, options.overwrite)
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
