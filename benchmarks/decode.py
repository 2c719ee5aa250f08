"""Measures decoding of a 1.1B-parameter Llama shape on CPU: passes of target and twin, where their time goes, and stacks.

    python benchmarks/decode.py --out benchmarks/results/decode-cpu.json
    python benchmarks/decode.py --trained SmolLM2-135M --prompts mbpp.jsonl HumanEval.jsonl.gz gsm8k_test.jsonl \\
        --out benchmarks/results/decode-SmolLM2-135M-cpu.json

Without --model it writes a checkpoint of random weights first (2.2 GB, in a temporary folder). Random weights say nothing of
acceptance, so coins accept the drafts and the text means nothing; what drafts below a twin is prompt look-up, which costs next to
nothing. The demo family runs too, with the acceptance that its trained weights have. All passes take turns with the plain read of
memory in every trial, and so do all stacks. Compiling is not timed. With --trained it measures a trained model instead, with the
acceptance that its weights have.
"""

import argparse
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import prompts as prompt_files
from large_checkpoint import model_folder
from machine import describe, publish, spread, watch
from matmul import reader

import mlspecqd_jax as mlsd
from mlspecqd_jax import specs
from mlspecqd_jax.network import ops as weights

WINDOWS = (1, 2, 4, 6, 8)
SLOTS, POSITION = 512, 256  # of the cache, and of the windows in it
REPEATED = 4  # passes a measurement
PROMPT, NEW = 128, 64  # tokens
LONG_PROMPT = 512
PROMPTS = Path(__file__).resolve().parent.parent / "examples" / "prompts.jsonl"
DEMO_PROMPTS = 6
TRAINED_PROMPTS = 9
TRAINED_STACKS = (
    [],
    ["mxfp4:3"],
    ["mxfp4:5"],
    ["nvfp4:4"],
    ["int8:3"],
    ["int8:5"],
    ["int8:7"],
    ["int8:7", "ngram:3"],
    ["ngram:3"],
    ["ngram:4"],
)
DEMO_STACKS = ([], ["mxfp4:5"], ["mxfp4:5", "demo-small@mxfp4:3"], ["demo-small@mxfp4:4"], ["ngram:4"])
# Name: draft_len of the twin, of look-up below it, and the rates at which coins accept.
STACKS = {
    "plain": ((), ()),
    **{f"twin, {g} at 0.9": ((g,), (0.9,)) for g in (3, 5, 7)},
    **{f"twin, {g} at 0.9; free, 3 at 0.6": ((g, 3), (0.9, 0.6)) for g in (5, 7, 9)},
    **{f"twin, {g} at 0.95; free, 5 at 0.8": ((g, 5), (0.95, 0.8)) for g in (7, 11, 15)},
}


def passes(model: mlsd.Model, window: int):
    """Return a function that runs passes of a window over a cache of SLOTS positions, each fed by the one before."""

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def run(params, tokens, cache):
        def one(_, carry):
            tokens, cache = carry
            logits, cache, _ = model.network(params, tokens, jnp.full((1,), POSITION, jnp.int32), cache)
            return jnp.argmax(logits, axis=2).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, REPEATED, one, (tokens, cache))

    carry = jnp.ones((1, window), jnp.int32), model.network.init_cache(model.params, 1, SLOTS)

    def call():
        nonlocal carry
        carry = jax.block_until_ready(run(model.params, *carry))

    return call


def products(model: mlsd.Model, window: int):
    """Return a function that runs the model's weight products alone, each after the one before, as often as `passes`."""

    @jax.jit
    def run(params, x):
        def one(_, x):
            for name, w in params.items():
                if len(w.shape) == 2 and "embed" not in name:
                    y = weights.linear(jnp.full((window, w.shape[1]), x), w)
                    x = x + 0 * y[0, 0]
            return x

        return jax.lax.fori_loop(0, REPEATED, one, x)

    return lambda: run(model.params, jnp.bfloat16(1)).block_until_ready()


def generation(stack: mlsd.Level, rates: tuple[float, ...], rounds: list[int]):
    """Return a function of a seed that gives the seconds of NEW tokens after PROMPT, prefill apart; it notes how many rounds."""
    length = jnp.array([PROMPT], jnp.int32)
    tokens = jnp.ones((1, mlsd.buffer_length(PROMPT + NEW)), jnp.int32)
    init, advance = jax.jit(mlsd.init), jax.jit(mlsd.advance, donate_argnums=1)

    def call(seed):
        sampling = mlsd.Sampling.create(1, stack.card.vocab_size, seed=seed, synthetic_acceptance=rates or None)
        state = jax.block_until_ready(init(stack, tokens, length, sampling))
        began = time.perf_counter()
        state = jax.block_until_ready(advance(stack, state, length + NEW, sampling))
        took = time.perf_counter() - began
        rounds.append(int(state.counts.rounds.sum()))
        return took

    return call


def prefill(stack: mlsd.Level):
    """Return a function that feeds LONG_PROMPT tokens to an empty cache."""
    sampling = mlsd.Sampling.create(1, stack.card.vocab_size)
    tokens = jnp.ones((1, mlsd.buffer_length(LONG_PROMPT + 1)), jnp.int32)
    init = jax.jit(mlsd.init)
    return lambda: jax.block_until_ready(init(stack, tokens, jnp.array([LONG_PROMPT + 1], jnp.int32), sampling))


def timed(call, per: int = 1):
    """Return a function of the trial's number that gives the seconds of a call, divided by `per`."""

    def seconds(_):
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) / per

    return seconds


def in_turn(calls: dict, trials: int) -> dict[str, dict[str, float]]:
    """Return the spread of what each function of the trial's number gives; the first calls compile and do not count."""
    found = {name: [] for name in calls}
    for trial in range(trials + 1):
        for name, call in calls.items():
            found[name].append(call(trial))
    return {name: spread(values[1:]) for name, values in found.items()}


def measure(folder: Path, trials: int) -> dict:
    """Return the times of passes, of their products, of stacks and of a prefill, and the memory of it all."""
    target = mlsd.load(folder)
    twin = target.quantized()
    models = {"target": target, "twin": twin}
    size = sum(w.nbytes for name, w in target.params.items() if "embed" not in name) // 2**16 * 2**16
    calls = {"read": timed(reader(size), 1)}
    for name, model in models.items():
        calls |= {f"{name}, {w}": timed(passes(model, w), REPEATED) for w in WINDOWS}
        calls |= {f"{name}, {w}, products": timed(products(model, w), REPEATED) for w in (1, 8)}
    calls["prefill"] = timed(prefill(mlsd.stack(target)))
    found = {"read_bytes": size, "seconds": in_turn(calls, trials)}
    del calls
    stacks, rounds = {}, {name: [] for name in STACKS}
    for name, (lengths, rates) in STACKS.items():
        stack = mlsd.stack(target, *zip((twin, mlsd.prompt_lookup()), lengths, strict=False))
        stacks[name] = generation(stack, rates, rounds[name])
    found["generation_seconds"] = in_turn(stacks, trials)
    found["tokens_per_round"] = {name: NEW * trials / sum(counts[1:]) for name, counts in rounds.items()}
    return found


def family(trials: int) -> dict:
    """Return what stacks of the demo family give, prompts one by one."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:DEMO_PROMPTS]]
    return by_stack(mlsd.load("demo"), DEMO_STACKS, prompts, trials)


def trained(folder: Path, files: list[Path], trials: int) -> dict:
    """Return the times of a trained model's passes, and what its stacks give for prompts one by one."""
    target = mlsd.load(folder)
    models = {"target": target, "twin": target.quantized()}
    calls = {f"{name}, {w}": timed(passes(model, w), REPEATED) for name, model in models.items() for w in WINDOWS}
    prompts = prompt_files.read(files, TRAINED_PROMPTS, 16, target.tokenizer)
    return {
        "model": f"{folder.name}, {target.num_parameters / 1e6:.0f}M parameters",
        "prompts": len(prompts),
        "seconds": in_turn(calls, trials),
        "stacks": by_stack(target, TRAINED_STACKS, [[ids] for ids in prompts], trials),
    }


def by_stack(target: mlsd.Model, given: Sequence[list[str]], prompts: list, trials: int) -> dict:
    """Return tokens a second of stacks over prompts one by one, and the acceptance that trained weights have."""
    acceptance = {}

    def run(name, stack):
        def call(_):
            reports = [mlsd.generate(stack, prompt, max_new_tokens=NEW).report for prompt in prompts]
            judged, accepted = (sum(r["levels"][0][count] for r in reports) for count in ("judged", "accepted"))
            acceptance[name] = accepted / judged if judged else None
            return sum(r["new_tokens"] for r in reports) / sum(r["seconds"] for r in reports)

        return call

    stacks = {" ".join(written) or "plain": specs.stack_of(specs.parse(written), target, mlsd.load) for written in given}
    rates = in_turn({name: run(name, stack) for name, stack in stacks.items()}, trials)
    return {"tokens_per_second": rates, "token_acceptance": acceptance}


def memory(folder: Path) -> dict[str, int]:
    """Return the anonymous memory that loading, quantizing and generating take at most, and what of it is accounted for."""

    def run():
        target = mlsd.load(folder)
        twin = target.quantized()
        generation(mlsd.stack(target, (twin, 5)), (0.9,), [])(0)
        return target, twin

    (target, twin), _, peak = watch(run)
    kept = {id(leaf) for leaf in jax.tree.leaves(target.params)}
    caches = target.network.init_cache(target.params, 1, mlsd.buffer_length(PROMPT + NEW))
    return {
        "peak_anonymous_bytes": peak,
        "weights": target.nbytes,
        "twin_adds": sum(leaf.nbytes for leaf in jax.tree.leaves(twin.params) if id(leaf) not in kept),
        "caches": sum(leaf.nbytes for leaf in jax.tree.leaves(caches)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder in Hugging Face's layout")
    parser.add_argument("--trained", type=Path, help="a folder of trained weights, which are measured instead")
    parser.add_argument("--prompts", type=Path, nargs="+", help="of --trained: files, see prompts.py")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    o = parser.parse_args()
    if o.trained:
        files = " ".join(file.name for file in o.prompts)
        settings = {"command": f"python benchmarks/decode.py --trained {o.trained.name} --prompts {files}", "trials": o.trials}
        settings |= {"new": NEW, "products": weights.implementation("cpu")}
        publish(settings | trained(o.trained, o.prompts, o.trials) | describe(), o.out)
        return
    with model_folder(o.model) as source:
        found = {"memory": memory(source)} | measure(source, o.trials) | {"demo": family(o.trials)}
    settings = {"command": "python benchmarks/decode.py", "trials": o.trials, "slots": SLOTS, "prompt": PROMPT, "new": NEW}
    settings |= {"stacks": STACKS}
    result = settings | {"products": weights.implementation("cpu")} | found | describe()
    publish(result, o.out)


if __name__ == "__main__":
    main()
