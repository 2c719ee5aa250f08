"""Measures one GPU or TPU: memory's roof, products of each format and of experts, generation with random weights, and exactness.

    python benchmarks/accelerator.py --out benchmarks/results/accelerator-h200.json

Prints JSON and saves it. Takes some 8 minutes: what does not fit into a part's `--budget` seconds is named and left out. Where
weights are random, drafts are accepted by coins, so the text means nothing; times do not depend on it. Exactness is judged on a
real model (`--checkpoint`, by default the demo): rows whose tokens are not those of plain decoding are counted. Each part is a
process of its own, since memory and XLA's flags belong to one.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
from accelerator_products import LAYERS, ROWS, experts, formats, kernels, seconds

ROOT = Path(__file__).resolve().parent.parent
# Vocabulary, hidden size, the MLP's middle, layers, heads, key/value heads, size of a head, positions.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("head_dim", "max_position_embeddings")
MODELS = {
    "8B": (128256, 4096, 14336, 32, 32, 8, 128, 131072),
    "1B": (128256, 2048, 8192, 16, 32, 8, 64, 131072),
    "tiny": (256, 64, 96, 1, 4, 2, 16, 1024),
}
ACCEPTANCE = (0.8, 0.9, 0.95)  # of the twin's tokens; 0.6 of the look-up's that draft for it
WHILE = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
PARTS = {"kernels": "", "formats": "", "experts": "", "programs": "", "exactness": "", "programs, loops in command buffers": WHILE}
PROMPTS = (  # of at most 16 tokens, so that one width of prefill serves all
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was a small robot",
    "Water boils at",
    "import json\n\ndef load(path):",
    "A train leaves at nine and after three hours",
    "The three primary colours are",
    "class Stack:\n    def push(self, item):",
    "Dear Sir or Madam,",
    "Photosynthesis is the process by which",
    "1, 1, 2, 3,",
    "To make bread you need",
    "for i in range(10):\n    print(i)",
    "She opened the letter and",
    "SELECT name FROM people WHERE",
    "A list differs from a tuple in",
)


def random_model(name: str):
    """Return a model of this shape with random weights, made on the device."""
    import jax
    import jax.numpy as jnp

    from mlspecqd_jax.loading.model import Model
    from mlspecqd_jax.network.families import config_of
    from mlspecqd_jax.network.network import Network
    from mlspecqd_jax.text.card import Card

    config = config_of("llama", **dict(zip(SIZES, MODELS[name], strict=True)))
    network, params = Network(config), {}
    make = jax.jit(lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(jnp.bfloat16), static_argnums=1)
    for i, (leaf, tensor) in enumerate(network.tensors().items()):
        shape = tensor.shape
        params[leaf] = make(jax.random.key(i), shape) if len(shape) == 2 else jnp.ones(shape, jnp.bfloat16)
    return Model(network, params, Card(name, config.vocab_size, config.max_positions, None, ()), Path("."))


def programs(options) -> dict:
    """Return compile time and tokens per second of plain decoding, of the twin alone, and of two and three levels."""
    import mlspecqd_jax as mlsd

    model = random_model(options.model or default_model())
    twin = model.quantized()
    levels = {
        "plain": (model,),
        "twin": (model, (twin, options.draft_len)),
        "nested": (model, (twin, options.draft_len), (mlsd.prompt_lookup(), 3)),
        "the twin alone": (twin,),
    }
    # The first ones matter most, should the budget not be enough for all.
    order = [("plain", True), ("twin", True), ("nested", True), ("plain", False), ("the twin alone", False)]
    order += [("twin", False), ("nested", False)]
    found, left_out, began = [], [], time.perf_counter()
    for name, exact in order:
        if time.perf_counter() - began > options.budget:
            left_out.append(f"{name}, exact={exact}")
            continue
        found += generated(mlsd.stack(*levels[name], exact=exact), {"model": model.card.name, "stack": name}, options)
    moved = {"target": moved_by_a_pass(model), "twin": moved_by_a_pass(twin)}
    settings = {"new_tokens": options.new_tokens, "draft_len": options.draft_len}
    return {"runs": found, "left_out": left_out, "weight_bytes_of_a_pass": moved} | settings


def generated(stack, about: dict, options) -> list[dict]:
    """Return the times of one stack at every acceptance of `ACCEPTANCE`."""
    import jax
    import jax.numpy as jnp

    import mlspecqd_jax as mlsd

    run = jax.jit(mlsd.generate_tokens, static_argnames="prefill_width", compiler_options=mlsd.compiler_options(stack))
    tokens = jnp.ones((1, mlsd.buffer_length(16 + options.new_tokens)), jnp.int32)
    length, limit = jnp.array([16]), jnp.array([16 + options.new_tokens])
    judges = sum(level.draft_len > 0 for level in stack.levels)
    found = []
    for rate in ACCEPTANCE if judges else (None,):
        coins = None if rate is None else [rate, 0.6][:judges]
        sampling = mlsd.Sampling.create(1, stack.card.vocab_size, synthetic_acceptance=coins)
        call = functools.partial(run, stack, tokens, length, limit, sampling, prefill_width=16)
        start = time.perf_counter()
        state = jax.block_until_ready(call())[2]
        first = time.perf_counter() - start
        took, rounds = seconds(call, options.trials), int(state.counts.rounds[0])
        found.append(
            about
            | {
                "exact": stack.exact,
                "acceptance": coins,
                "rounds": rounds,
                "tokens_per_second": int(state.length[0] - 16) / took["median"],
                "seconds_a_round": took["median"] / rounds,
                "seconds": took,
                "seconds_with_compiling": first,
            }
        )
    return found


def exactness(options) -> dict:
    """Return how many rows of a real model differ from plain decoding, alone and in batches, greedy and with noise."""
    import mlspecqd_jax as mlsd
    from mlspecqd_jax import specs

    model = mlsd.load(options.checkpoint)
    stacks = {"plain": mlsd.stack(model)}
    for drafts in options.drafts:
        stacks[drafts] = specs.stack_of(specs.parse(drafts.split()), model, mlsd.load)
    stacks["plain, exact=False"] = mlsd.stack(model, exact=False)  # what exactness costs
    prompts, found, left_out, plain, began = list(PROMPTS)[: options.prompts], [], [], {}, time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor() as pool:  # compile all at once: no time that matters is measured here
        programs = itertools.product(stacks.values(), options.batches)
        list(pool.map(lambda program: mlsd.generate(program[0], prompts[: program[1]], max_new_tokens=1), programs))
    for batch in options.batches:
        for name, stack in stacks.items():
            if time.perf_counter() - began > options.budget:
                left_out.append(f"{name}, batch {batch}")
                continue
            for temperature in (0.0, 0.8):
                rows, reports = in_batches(stack, prompts, batch, temperature, options.new_tokens)
                plain.setdefault((batch, temperature), rows)  # the first stack is the plain one
                alone = plain.get((1, temperature))
                found.append(
                    {
                        "stack": name,
                        "batch": batch,
                        "temperature": temperature,
                        "rows": len(rows),
                        "unlike_plain": sum(a != b for a, b in zip(rows, plain[batch, temperature], strict=True)),
                        "unlike_plain_alone": None if alone is None else sum(a != b for a, b in zip(rows, alone, strict=True)),
                        "token_acceptance": statistics.mean(r["levels"][0]["token_acceptance"] or 0 for r in reports),
                        "tokens_per_second": sum(map(len, rows)) / sum(r["seconds"] for r in reports),
                    }
                )
    return {"model": str(options.checkpoint), "runs": found, "left_out": left_out}


def in_batches(stack, prompts: list[str], batch: int, temperature: float, new_tokens: int):
    """Return (the new tokens of every prompt, the reports), `batch` prompts at a time; prompt i has seed i wherever it lies."""
    import mlspecqd_jax as mlsd

    rows, reports = [], []
    for at in range(0, len(prompts), batch):
        out = mlsd.generate(stack, prompts[at : at + batch], temperature=temperature, seed=at, max_new_tokens=new_tokens)
        rows += out.tokens
        reports.append(out.report)
    return rows, reports


def moved_by_a_pass(model) -> int:
    """Return the bytes of the weights that a pass reads whole: all but an embedding of which it looks up rows."""
    tied = "lm_head.weight" not in model.params
    return sum(leaf.nbytes for name, leaf in model.params.items() if tied or "embed" not in name)


def default_model() -> str:
    """Return the largest shape of which the target and its twin take less than 70 % of the device's memory."""
    import jax

    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return "8B" if memory > 30e9 else "1B" if memory else "tiny"


def device() -> dict:
    import jax

    from pallas_kernels import chip_of

    d = jax.devices()[0]
    return {"device": d.device_kind, "chip": chip_of(d), "platform": d.platform, "jax": jax.__version__}


MEASURE = {"kernels": kernels, "formats": formats, "experts": experts, "programs": programs, "exactness": exactness}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--part", choices=tuple(MEASURE), help="measure this alone, in this process")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure these, in this order")
    parser.add_argument("--budget", type=float, default=120, help="seconds for each part")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=2**31, help="of weights that a measurement goes through")
    parser.add_argument("--layers", nargs="+", default=["8B", "1B", "70B"], choices=LAYERS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--model", choices=MODELS, help="for generation with random weights; by default what fits")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--draft-len", type=int, default=8)
    parser.add_argument("--checkpoint", default="demo", help="a real model for exactness: a folder, demo or demo-small")
    parser.add_argument("--drafts", nargs="+", default=("mxfp4:5", "mxfp4:8 ngram:3", "ngram:4"), help="for exactness")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8), help="for exactness")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="for exactness, at most")
    options = parser.parse_args()
    if options.part:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(device() | MEASURE[options.part](options)))
        return
    versions = machine.describe()["versions"]
    result = {"command": shlex.join(["python", "benchmarks/accelerator.py", *sys.argv[1:]]), "device": None, "versions": versions}
    for name in options.parts:
        if PARTS[name] == WHILE and any(part.get("platform", "gpu") != "gpu" for part in measured(result)):
            continue
        result[name] = in_a_process(name.partition(",")[0], PARTS[name])
        result["device"] = result[name].get("device", result["device"])
        print(json.dumps({name: result[name]}, indent=1), flush=True)
        if options.out:  # after every part, so that a lease that ends early loses one part at most
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    if any("error" in part for part in measured(result)):
        sys.exit("a part failed; its error is in the result")


def measured(result: dict) -> list[dict]:
    return [part for part in result.values() if isinstance(part, dict)]


def in_a_process(part: str, flags: str) -> dict:
    """Run a part by this script with these XLA flags added; a failure is a result too."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_ENABLE_COMPILATION_CACHE": "0"}  # so that compiling is measured
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        return {"error": process.stderr.strip()[-2000:] or f"exit status {process.returncode}"}
    return json.loads(process.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
