"""Measures loading: time and anonymous memory of importing safetensors, converting, and loading what was converted.

    python benchmarks/loading.py --out benchmarks/results/loading-cpu.json

Without --model it makes a checkpoint of 1.1B parameters first (2.2 GB, and as much again for the conversion, in a temporary
folder). Files are in the page cache. Linux only: anonymous memory is read from /proc.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint  # noqa: F401  (what is imported later is not counted as the model's memory)
from large_checkpoint import model_folder
from machine import describe, publish, spread, watch
from transformers import CONFIG_MAPPING

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import checkpoint


def sums(model: mlsd.Model) -> dict[str, float]:
    """Return each parameter's sum, by which two loads are compared."""
    return {name: float(jnp.sum(leaf, dtype=jnp.float32)) for name, leaf in model.params.items()}


def measure(source: Path, trials: int) -> dict:
    """Import, convert and load a checkpoint `trials` times, in turn."""
    CONFIG_MAPPING["llama"]
    jax.block_until_ready(jnp.zeros(3))
    kinds = ("import", "convert", "load")
    seconds, peaks = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}

    def timed(kind, call):
        result, took, peak = watch(call)
        seconds[kind].append(took)
        peaks[kind].append(peak)
        return result

    for _ in range(trials):
        with tempfile.TemporaryDirectory() as folder:
            converted = Path(folder) / "converted"
            model = timed("import", lambda: mlsd.load(source))
            timed("convert", lambda model=model, converted=converted: checkpoint.save(converted, source, model.params))
            size, largest = model.nbytes, sorted(leaf.nbytes for leaf in model.params.values())[-2:]
            before = sums(model)
            del model
            model = timed("load", lambda converted=converted: mlsd.load(converted))
            if sums(model) != before:
                raise RuntimeError("the converted checkpoint holds other weights than its source")
            del model
    return {
        "command": "python benchmarks/loading.py",
        "trials": trials,
        "model_bytes": size,
        "largest_two_tensors_bytes": sum(largest),
        "seconds": {kind: spread(values) for kind, values in seconds.items()},
        "peak_anonymous_bytes": {kind: max(values) for kind, values in peaks.items()},
    } | describe()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder in Hugging Face's layout")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    with model_folder(options.model) as source:
        publish(measure(source, options.trials), options.out)


if __name__ == "__main__":
    main()
