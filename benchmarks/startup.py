"""Measures start-up: seconds from the shell command to the first text of the default run, with and without compiled programs kept.

    python benchmarks/startup.py --out benchmarks/results/startup-cpu.json

Cold and warm runs take turns: each cold run has an empty compilation cache, the warm run after it finds what the cold one left.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe, publish, spread

COMMAND = [sys.executable, "-m", "mlspecqd_jax.cli", "generate", "--prompt", "def read_file(path):"]


def first_text(cache: str) -> tuple[float, float]:
    """Run the command with this cache folder; return seconds to the first character of text and to the end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"XDG_CACHE_HOME": cache}
    began = time.perf_counter()
    with subprocess.Popen(COMMAND, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if not process.stdout.read(1):
            raise RuntimeError(f"{' '.join(COMMAND)} printed nothing")
        first = time.perf_counter() - began
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(COMMAND)} ended with exit code {process.returncode}")
    return first, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    times = {"cold": [], "warm": []}
    for trial in range(options.trials):
        with tempfile.TemporaryDirectory() as cache:
            for kind in times:
                times[kind].append(first_text(cache))
                print(f"trial {trial + 1}: {kind} {times[kind][-1][0]:.1f} s to the first text, {times[kind][-1][1]:.1f} s in all")
    result = {
        "command": "python benchmarks/startup.py",
        "trials": options.trials,
        "first_text_seconds": {kind: spread([first for first, _ in pairs]) for kind, pairs in times.items()},
        "total_seconds": {kind: spread([total for _, total in pairs]) for kind, pairs in times.items()},
    } | describe()
    publish(result, options.out)


if __name__ == "__main__":
    main()
