"""What a result was measured on, how its spread is told, where it goes, and what memory a call takes."""

import json
import os
import platform
import statistics
import threading
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("jax", "flax", "transformers", "orbax-checkpoint")


def describe() -> dict:
    """Return the versions, the CPU's name and the number of cores."""
    return {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
    }


def cpu_model() -> str:
    """Return the CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def publish(result: dict, out: Path | None) -> None:
    """Print a result as JSON, and write it to a file if one is named."""
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


def anonymous() -> int:
    """Return the process's anonymous memory, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def watch(call):
    """Return (result, seconds, peak of anonymous memory above what it was)."""
    before = peak = anonymous()
    done = threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    began = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    return result, seconds, peak - before
