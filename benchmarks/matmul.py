"""Measures weight products on CPU: GB/s of weight bytes against the rate at which the same cores read memory.

    python benchmarks/matmul.py --out benchmarks/results/matmul-cpu.json

XLA's product, the C++ one for bfloat16, the C++ one for MXFP4 and the plain read take turns in every trial. Each program goes
through many copies of its weight, more bytes than caches hold. Needs a C++ compiler.
"""

import argparse
import ctypes
import os
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe, publish, spread

import cpu_kernels
from cpu_kernels.build import find_compiler
from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.placement import place
from pallas_kernels import xla

SIZES = ("5632x2048", "2048x5632", "11008x4096")  # of a 1.1B Llama's MLP, and of a 7B one's
ROWS = (1, 2, 4, 6, 8, 16, 64, 512)
KINDS = ("xla", "bf16", "mxfp4")


def reader(size: int):
    """Return a function that reads `size` bytes with every core."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "roof.so"
        source = Path(__file__).parent / "read_roof.cc"
        flags = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
        subprocess.run([*find_compiler(), *flags, source, "-o", library], check=True)
        read = ctypes.CDLL(str(library)).read_sum
    read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    read.restype = ctypes.c_uint64
    words, cores = np.ones(size // 8, np.uint64), len(os.sched_getaffinity(0))
    if read(words.ctypes.data, len(words), cores) < 0.999 * len(words):  # each is 1; what does not divide evenly is left out
        raise RuntimeError("the read loop does not read everything")
    return lambda: read(words.ctypes.data, len(words), cores)


def passes(kind: str, n: int, k: int, rows: int, size: int):
    """Return (function that runs the product with one copy of its weight after the other, their bytes, how many)."""
    random = np.random.RandomState(0)
    w = jnp.asarray(random.standard_normal((n, k)) / np.sqrt(k), jnp.bfloat16)
    leaf = quantize(w)
    weight = tuple(leaf.arrays.values()) if kind == "mxfp4" else (w,)
    product = {"xla": xla.matmul, "bf16": cpu_kernels.dense_matmul, "mxfp4": cpu_kernels.mxfp4_matmul}[kind]
    one = sum(part.nbytes for part in weight)
    copy = (lambda part: part + 0) if kind == "mxfp4" else place  # as models hold them
    copies = [tuple(map(copy, weight)) for _ in range(max(1, size // one))]

    @jax.jit
    def run(x, copies):
        for copy in copies:
            x = x + 0 * product(x, *copy)[:, :1].astype(x.dtype)  # each waits for the one before
        return x

    x = jnp.asarray(random.standard_normal((rows, k)), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    found = np.asarray(jax.jit(product)(x, *weight))
    if np.abs(found - expected).max() > (1e-4 if kind != "mxfp4" else 1.0):
        raise RuntimeError(f"{kind} is wrong at {rows} rows")
    run(x, copies).block_until_ready()
    return lambda: run(x, copies).block_until_ready(), one * len(copies), len(copies)


def seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(sizes, rows, trials: int, size: int) -> dict:
    """Return, by size and rows, rates in GB/s by kind, and what a trial compares: BF16 with the read, MXFP4 with BF16."""
    read, roof, result = reader(size), [], {}
    for name in sizes:
        n, k = map(int, name.split("x"))
        result[name] = {}
        for m in rows:
            calls = {kind: passes(kind, n, k, m, size // max(1, m // 8)) for kind in KINDS}
            rates = {"read": []} | {kind: [] for kind in KINDS}
            for _ in range(trials):
                rates["read"].append(size / seconds(read) / 1e9)
                for kind, (call, total, _) in calls.items():
                    rates[kind].append(total / seconds(call) / 1e9)
            roof += rates["read"]
            smaller = calls["bf16"][1] / calls["bf16"][2] / (calls["mxfp4"][1] / calls["mxfp4"][2])  # bytes of one product
            found = {"gb_per_second": {kind: spread(each) for kind, each in rates.items()}}
            found["bf16_share_of_read"] = spread(np.divide(rates["bf16"], rates["read"]).tolist())
            found["bf16_seconds_over_mxfp4"] = spread((smaller * np.divide(rates["mxfp4"], rates["bf16"])).tolist())
            result[name][m] = found
            shown = ", ".join(f"{kind} {each['median']:.1f}" for kind, each in found["gb_per_second"].items())
            share, ratio = found["bf16_share_of_read"]["median"], found["bf16_seconds_over_mxfp4"]["median"]
            print(f"{name}, M {m}: {shown} GB/s; bf16 at {share:.0%} of the read, mxfp4 in 1/{ratio:.2f} of its time", flush=True)
    return {"read_gb_per_second": spread(roof), "products": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--bytes", type=float, default=5e8, help="of weights that a program goes through")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    isas = {product: cpu_kernels.isas(product)[0] for product in ("matmul", "mxfp4_matmul")}
    result = {"command": "python benchmarks/matmul.py", "trials": options.trials, "instruction_sets": isas}
    result |= measure(options.sizes, options.rows, options.trials, int(options.bytes) // 2**16 * 2**16) | describe()
    publish(result, options.out)


if __name__ == "__main__":
    main()
