"""Measures start-up: from the shell command to the first text, with and without what earlier runs kept.

    python benchmarks/startup.py --out benchmarks/results/startup-cpu.json
    python benchmarks/startup.py SmolLM2-135M --draft mxfp4 --out benchmarks/results/startup-SmolLM2-135M-cpu.json

Three kinds take turns: in an empty cache ("first"), in one that holds the C++ libraries alone ("cold"), then again in the same one
("warm"). Seconds, and those of all processors, child processes such as a compiler's among them.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe, publish, spread

COMMAND = [sys.executable, "-m", "mlspecqd_jax.cli", "generate"]
PROMPT = ["--prompt", "def read_file(path):"]
KINDS = ("first", "cold", "warm")


def processor_seconds(pid: int) -> float:
    """Return what a process and those of its children that ended took of the processors so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def first_text(cache: str, asked: list[str]) -> dict[str, float]:
    """Run the command with this cache folder; return what it took to the first character of text and to the end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"XDG_CACHE_HOME": cache}
    before = _of_children()
    began = time.perf_counter()
    with subprocess.Popen(
        [*COMMAND, *asked, *PROMPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        if not process.stdout.read(1):
            raise RuntimeError(f"{' '.join(COMMAND)} printed nothing")
        first, processor = time.perf_counter() - began, processor_seconds(process.pid)
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(COMMAND)} ended with exit code {process.returncode}")
    return {
        "first_text_seconds": first,
        "first_text_processor_seconds": processor,
        "total_seconds": time.perf_counter() - began,
        "total_processor_seconds": _of_children() - before,
    }


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def forget_programs(cache: str) -> None:
    """Leave of a cache the C++ libraries alone."""
    for folder in (Path(cache) / "mlspecqd-jax").iterdir():
        if folder.name != "cpu_kernels":
            shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--draft", action="append", default=[], help="as of mlspecqd generate")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    asked = [options.model] * (options.model != "demo") + [word for draft in options.draft for word in ("--draft", draft)]
    runs = {kind: [] for kind in KINDS}
    for trial in range(options.trials):
        with tempfile.TemporaryDirectory() as cache:
            for kind in KINDS:
                if kind == "cold":
                    forget_programs(cache)
                runs[kind].append(first_text(cache, asked))
                took = ", ".join(f"{name} {value:.1f}" for name, value in runs[kind][-1].items())
                print(f"trial {trial + 1}, {kind}: {took}", file=sys.stderr)
    measures = list(runs["warm"][0])
    named = [Path(options.model).name] * (options.model != "demo") + asked[1 if options.model != "demo" else 0 :]
    result = {
        "command": " ".join(["python benchmarks/startup.py", *named]),
        "model": Path(options.model).name,
        "drafts": options.draft,
        "trials": options.trials,
    }
    result |= {measure: {kind: spread([run[measure] for run in runs[kind]]) for kind in KINDS} for measure in measures}
    publish(result | describe(), options.out)


if __name__ == "__main__":
    main()
