"""Measures how long a generation's program is traced, lowered and compiled, by layers, levels and device.

    python benchmarks/compile.py --device cpu --layers 8 16 --out benchmarks/results/compile.json

Models of a small width, since time goes by operations, not by bytes: the target alone (1 level), with its MXFP4 twin on its cache
(2), and with a second twin that drafts for that one (3). Devices beside cpu are described to their compilers (v5e:1x1, H200), as in
the tests. Runs are added to those that the file holds, in place of the same ones.

For a GPU that is not here, JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 must be set.
"""

import argparse
import functools
import gc
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from machine import describe, publish

from mlspecqd_jax.network.config import Config
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.speculation import loop
from mlspecqd_jax.speculation.level import Level
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.weights.quantization import quantize_params

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what describes chips that are not here, and small models
import chips
import programs
from tiny import shape

SLOTS, WIDTH = 512, 16
SIZES = {"vocabulary": 4096, "hidden": 512, "middle": 1024, "heads": 8, "kv_heads": 4, "head_dim": 64}


def config_of(layers: int) -> Config:
    """Return a model of so many layers."""
    s = SIZES
    return shape(s["vocabulary"], s["hidden"], s["middle"], layers, s["heads"], s["kv_heads"], s["head_dim"], 2048)


def stack_of(config: Config, levels: int, mesh) -> Level:
    """Return a stack of so many levels, its parameters abstract."""
    network = Network(config, mesh)
    if mesh is None:
        plain = {name: jax.ShapeDtypeStruct(tensor.shape, jnp.bfloat16) for name, tensor in network.tensors().items()}
        twin = jax.eval_shape(functools.partial(quantize_params, tensors=network.tensors()), plain)
    else:
        plain, twin = programs.plain(config, mesh), programs.twin(config, mesh)
    below = None
    for draft_len in (3, WIDTH - 1)[3 - levels :] if levels > 1 else ():
        below = Level(network, twin, below, draft_len if below else 0, share_cache=True)
    return Level(network, plain, below, (WIDTH - 1) if below else 0, window_multiple=1 if mesh is None else WIDTH)


def seconds_of(device: str, layers: int, levels: int) -> dict:
    """Return the processor's seconds of each stage."""
    mesh = None if device == "cpu" else chips.mesh(device)
    config = config_of(layers)
    stack = stack_of(config, levels, mesh)
    sampling = jax.eval_shape(lambda: Sampling.create(1, config.vocab_size))
    tokens, row = jax.ShapeDtypeStruct((1, SLOTS), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    state = jax.eval_shape(loop.init, stack, tokens, row, sampling)
    given = (stack, state, row, sampling, jax.ShapeDtypeStruct((), jnp.int32))
    stages, options = {}, {}

    def timed(stage, call):
        began, before = time.perf_counter(), time.process_time()
        result = call()
        stages[stage] = {"seconds": time.perf_counter() - began, "processor": time.process_time() - before}
        return result

    jitted = jax.jit(loop.advance, donate_argnums=1)
    if mesh is not None:
        given, options = chips.placed(mesh, given), chips.settings(mesh)
    with chips.context(mesh):
        traced = timed("trace", lambda: jitted.trace(*given))
        lowered = timed("lower", traced.lower)
        timed("compile", lambda: lowered.compile(options))
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, or one to compile for, such as v5e:1x1 or H200")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 80])
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="write the result as JSON, beside the runs that it holds")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    known = json.loads(options.out.read_text())["runs"] if options.out and options.out.exists() else []
    runs = {(run["device"], run["layers"], run["levels"]): run for run in known}
    seconds_of(options.device, 1, 1)  # what the first program of a process takes more
    for layers in options.layers:
        for levels in options.levels:
            jax.clear_caches()
            gc.collect()
            run = {"device": options.device, "layers": layers, "levels": levels}
            runs[options.device, layers, levels] = run | {"stages": seconds_of(options.device, layers, levels)}
            print(json.dumps(runs[options.device, layers, levels]), file=sys.stderr, flush=True)
    ordered = [runs[key] for key in sorted(runs)]
    publish({"command": "python benchmarks/compile.py", "sizes": SIZES, "runs": ordered} | describe(), options.out)


if __name__ == "__main__":
    main()
