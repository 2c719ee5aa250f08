"""Measures the same checkpoint in llama.cpp (BF16 and Q4_0), in transformers and here, on CPU, all taking turns.

    python benchmarks/peers.py --out benchmarks/results/peers-cpu.json

Greedy tokens after a prompt of PROMPT, one and eight positions at once, and a prompt of LONG_PROMPT tokens. A peer that is not
installed is skipped, with the line that installs it. The same prompt's logits are compared first: all must compute one model.
"""

import argparse
import importlib.util
import os
import tempfile
import time
from importlib import metadata
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from decode import LONG_PROMPT, NEW, POSITION, PROMPT, REPEATED, SLOTS, generation, in_turn, passes, prefill, timed
from gguf_checkpoint import write_gguf, write_q4_0
from large_checkpoint import model_folder
from machine import describe, publish

import mlspecqd_jax as mlsd

PEERS = {"llama.cpp": ("llama_cpp", "gguf"), "transformers": ("torch",)}
INSTALL = {"llama.cpp": "pip install llama-cpp-python gguf", "transformers": "pip install torch"}
CHECKED = list(range(1, 33))  # the prompt whose logits are compared


def ours(folder: Path) -> tuple[dict, np.ndarray]:
    """Return (measurements by name, logits after CHECKED)."""
    target = mlsd.load(folder)
    twin = target.quantized()
    stack = mlsd.stack(target)
    decode = generation(stack, (), [])
    calls = {
        "ours: token": lambda trial: decode(trial) / NEW,
        "ours: prefill": timed(prefill(stack)),
        "ours: 1 position": timed(passes(target, 1), REPEATED),
        "ours: 8 positions": timed(passes(target, 8), REPEATED),
        "ours: twin, 1 position": timed(passes(twin, 1), REPEATED),
    }
    cache = target.network.init_cache(target.params, 1, SLOTS)
    logits, *_ = target.network(target.params, jnp.array([CHECKED], jnp.int32), jnp.zeros((1,), jnp.int32), cache)
    return calls, np.asarray(logits[0, -1], np.float32)


def llama_cpp(file: Path, name: str) -> tuple[dict, np.ndarray]:
    """Return the same of llama.cpp; each token's logits are taken, as verification needs them, but not the prompt's."""
    from llama_cpp import Llama

    threads = len(os.sched_getaffinity(0))
    common = {"n_ctx": SLOTS + LONG_PROMPT, "n_batch": LONG_PROMPT, "n_ubatch": LONG_PROMPT, "verbose": False}
    common |= {"n_threads": threads, "n_threads_batch": threads}
    each, last = (Llama(str(file), logits_all=all_, **common) for all_ in (True, False))

    def decode(_):
        each.reset()
        each.eval([1] * PROMPT)
        began = time.perf_counter()
        for _ in range(NEW):
            each.eval([int(np.argmax(each.scores[each.n_tokens - 1]))])
        return (time.perf_counter() - began) / NEW

    def positions(count):
        def call(_):
            each.eval([1] * max(0, POSITION - each.n_tokens))
            began = time.perf_counter()
            for _ in range(REPEATED):
                each.n_tokens = POSITION  # what is beyond is forgotten by the next call
                each.eval([1] * count)
            return (time.perf_counter() - began) / REPEATED

        return call

    def long_prompt():
        last.reset()
        last.eval([1] * LONG_PROMPT)

    each.eval(CHECKED)
    logits = np.array(each.scores[each.n_tokens - 1], np.float32)
    return {
        f"{name}: token": decode,
        f"{name}: prefill": timed(long_prompt),
        f"{name}: 1 position": positions(1),
        f"{name}: 8 positions": positions(8),
    }, logits


def transformers(folder: Path) -> tuple[dict, np.ndarray]:
    """Return the same of transformers, eager."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    @torch.inference_mode()
    def decode(_):
        found = model(torch.ones((1, PROMPT), dtype=torch.long), use_cache=True, logits_to_keep=1)
        began = time.perf_counter()
        for _ in range(NEW):
            token = found.logits[:, -1:].argmax(-1)
            found = model(token, past_key_values=found.past_key_values, use_cache=True)
        return (time.perf_counter() - began) / NEW

    @torch.inference_mode()
    def long_prompt():
        model(torch.ones((1, LONG_PROMPT), dtype=torch.long), use_cache=True, logits_to_keep=1)

    with torch.inference_mode():
        logits = model(torch.tensor([CHECKED])).logits[0, -1].float().numpy()
    return {"transformers: token": decode, "transformers: prefill": timed(long_prompt)}, logits


def missing() -> dict[str, str]:
    """Return the peers that are not installed, and what installs them."""
    return {p: INSTALL[p] for p, modules in PEERS.items() if not all(map(importlib.util.find_spec, modules))}


def measure(folder: Path, work: Path, trials: int) -> dict:
    """Return the spread of seconds by what was measured, and how far the peers' logits agree with ours."""
    skipped = missing()
    for peer, line in skipped.items():
        print(f"{peer} is not installed and is skipped: {line}", flush=True)
    calls, logits = ours(folder)
    others = {}
    if "llama.cpp" not in skipped:
        files = {"llama.cpp BF16": work / "model.gguf", "llama.cpp Q4_0": work / "q4_0.gguf"}
        write_gguf(folder, files["llama.cpp BF16"])
        write_q4_0(*files.values())
        others |= {name: llama_cpp(file, name) for name, file in files.items()}
    if "transformers" not in skipped:
        others["transformers"] = transformers(folder)
    agreement = {name: float(np.corrcoef(logits, theirs)[0, 1]) for name, (_, theirs) in others.items()}
    print("correlation of logits with ours:", agreement, flush=True)
    if any(r < (0.9 if "Q4_0" in name else 0.999) for name, r in agreement.items()):
        raise RuntimeError("a peer computes another model")
    for theirs, _ in others.values():
        calls |= theirs
    return {"skipped": skipped, "agreement": agreement, "seconds": in_turn(calls, trials)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Llama-shaped folder in Hugging Face's layout; else random weights of 1.1B")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    o = parser.parse_args()
    with model_folder(o.model) as source, tempfile.TemporaryDirectory() as work:
        found = measure(source, Path(work), o.trials)
    packages = ("llama-cpp-python", "torch")
    versions = {p: metadata.version(p) for p in packages if importlib.util.find_spec(p.replace("-python", "").replace("-", "_"))}
    result = {"command": "python benchmarks/peers.py", "trials": o.trials, "prompt": PROMPT, "new": NEW} | found | describe()
    result["versions"] |= versions
    publish(result, o.out)


if __name__ == "__main__":
    main()
