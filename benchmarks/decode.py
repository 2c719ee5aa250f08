"""Measures decoding of a 1.1B-parameter Llama shape on CPU: plain, its twin alone, and the twin drafting at a synthetic acceptance.

    python benchmarks/decode.py --out benchmarks/results/decode-cpu.json

Without --model it writes a checkpoint of random weights first (2.2 GB, in a temporary folder), so drafts are accepted by coins and the
text means nothing. The stacks take turns in every trial; compiling is not timed.
"""

import argparse
import json
import tempfile
from pathlib import Path

from large_checkpoint import write_checkpoint
from machine import describe, spread

import mlspecqd_jax as mlsd
from mlspecqd_jax import matmul

PROMPT = list(range(1, 65))


def measure(folder: Path, tokens: int, trials: int, draft_len: int, acceptance: float) -> dict:
    """Return tokens a second by stack."""
    target = mlsd.load(folder)
    twin = target.quantized()
    stacks = {
        "plain": (mlsd.stack(target), {}),
        "twin alone": (mlsd.stack(twin), {}),
        f"twin drafts {draft_len}": (mlsd.stack(target, (twin, draft_len)), {"synthetic_acceptance": [acceptance]}),
    }
    rates = {name: [] for name in stacks}
    for trial in range(-1, trials):  # the first compiles
        for name, (stack, more) in stacks.items():
            report = mlsd.generate(stack, [PROMPT], max_new_tokens=tokens, stop_token_ids=[], **more).report
            if trial >= 0:
                rates[name].append(report["tokens_per_second"])
                print(f"trial {trial + 1}: {name} {rates[name][-1]:.1f} tokens/s", flush=True)
    return {
        "products": matmul.implementation("cpu"),
        "bytes": {"target": target.nbytes, "twin": twin.nbytes},
        "tokens_per_second": {name: spread(values) for name, values in rates.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder in Hugging Face's layout")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--draft-len", type=int, default=7)
    parser.add_argument("--acceptance", type=float, default=0.9, help="the rate at which coins accept a drafted token")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = o.model or Path(folder) / "large"
        if o.model is None:
            write_checkpoint(source)
        found = measure(source, o.tokens, o.trials, o.draft_len, o.acceptance)
    result = {"command": "python benchmarks/decode.py", "trials": o.trials, "tokens": o.tokens} | found | describe()
    result |= {"draft_len": o.draft_len, "acceptance": o.acceptance}
    print(json.dumps(result, indent=1))
    if o.out:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
