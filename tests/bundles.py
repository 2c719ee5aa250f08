"""Counts the instruction bundles of the TPU decode kernel, and of a plain BF16 kernel with the same blocks.

    python tests/bundles.py v5e 4096x4096 1024x4096
    python tests/bundles.py v5e 4096x4096 int4 nvfp4

Prints JSON: for each size NxK, for 8 and 16 rows, both counts, the block of weights that a step of the grid takes, and the cycles
in which memory delivers it. Given formats too, the counts of the kernel for all formats, by format, and beside the cycles those in
which memory would deliver the block in bfloat16. A process of its own, since libtpu reads what to dump when it starts.
Straight-line code runs about a bundle a cycle, without what it waits for.
"""

import functools
import json
import os
import pathlib
import re
import sys
import tempfile

DUMP = tempfile.TemporaryDirectory(prefix="bundles-")
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP.name} --xla_jf_dump_llo_text=true"
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}

import chips  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

from mlspecqd_jax.weights.cast import quantize  # noqa: E402
from mlspecqd_jax.weights.formats import FORMATS  # noqa: E402
from pallas_kernels import tpu, tpu_tables  # noqa: E402
from pallas_kernels.blocks import tpu_block_n, tpu_tile  # noqa: E402

# Memory bandwidth in GB/s, of data sheets, and clock in GHz.
SPEEDS = {"v5e": (819, 1.5), "v6e": (1640, 1.75)}


def bf16_matmul(x, w, *, tile, block):
    """x [M, K] @ w [K, N] in f32, the blocks those of the MXFP4 kernel."""

    def kernel(x_ref, w_ref, out_ref):
        @pl.when(pl.program_id(1) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        out_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)

    (rows, k), n = x.shape, w.shape[1]
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, block), k // tile),
        in_specs=[pl.BlockSpec((rows, tile), lambda j, t: (0, t)), pl.BlockSpec((tile, block), lambda j, t: (t, j))],
        out_specs=pl.BlockSpec((rows, block), lambda j, t: (0, j)),
        out_shape=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="bf16_matmul",
    )(x, w)


def bundles(mesh, kernel: str, function, *arguments) -> int:
    """Return how many bundles the kernel of this name has in a program."""
    folder = pathlib.Path(DUMP.name)
    for file in folder.iterdir():
        file.unlink()
    chips.compile_for(mesh, function, *arguments)
    pattern = re.compile(rf"\d-{kernel}(\.\d+)?-\d+-schedule-analysis_final_bundles")
    [report] = [file for file in folder.iterdir() if pattern.search(file.name)]
    return int(re.search(r"total scheduled bundles:\s+(\d+)", report.read_text())[1])


def count(mesh, chip: str, n: int, k: int) -> dict:
    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    arranged = jax.eval_shape(tpu.arrange, array((n, k // 2), jnp.uint8), array((n, k // 32), jnp.uint8))
    codes, scales = arranged["codes"], arranged["scales"]
    tiles, half, _ = codes.shape
    tile, block = 2 * half, tpu_block_n(n, tiles)
    bandwidth, clock = SPEEDS[chip]
    found = {"block": [tile, block], "memory cycles": round(tile * block * 17 / 32 / bandwidth * clock)}
    for rows in (8, 16):
        mxfp4 = bundles(
            mesh, "mxfp4_decode", functools.partial(tpu.mxfp4_matmul, n=n), array((rows, k), jnp.bfloat16), codes, scales
        )
        plain = functools.partial(bf16_matmul, tile=tile, block=block)
        whole = (array((rows, tiles * tile), jnp.bfloat16), array((tiles * tile, n), jnp.bfloat16))
        found[rows] = {"mxfp4": mxfp4, "bf16": bundles(mesh, "bf16_matmul", plain, *whole)}
    return found


def count_of_format(mesh, chip: str, n: int, k: int, name: str) -> dict:
    format, w = FORMATS[name], jax.ShapeDtypeStruct((n, k), jnp.bfloat16)
    stored = jax.eval_shape(functools.partial(quantize, format=name), w).core
    arrays = jax.eval_shape(functools.partial(tpu_tables.arrange, format=format), **stored)
    tile, block = tpu_tile(k), tpu_tables.block_of(n, arrays["codes"].shape[1], wide=False, format=format)
    bandwidth, clock = SPEEDS[chip]
    steps = k / tile * n / block
    moved = sum(array.size * array.dtype.itemsize for role, array in arrays.items() if role != "factors") / steps
    found = {"block": [tile, block], "memory cycles": round(moved / bandwidth * clock)}
    found["memory cycles in bf16"] = round(2 * tile * block / bandwidth * clock)

    def run(x, arrays):
        return tpu_tables.TABLE.run(x, arrays, n=n, chip="", format=format, interpret=False)

    for rows in (8, 16):
        found[rows] = bundles(mesh, f"{name}_table", run, jax.ShapeDtypeStruct((rows, k), jnp.bfloat16), arrays)
    return found


if __name__ == "__main__":
    chip, *asked = sys.argv[1:]
    mesh, formats = chips.mesh(f"{chip}:1x1"), [name for name in asked if name in FORMATS]
    sizes = {name: tuple(map(int, name.split("x"))) for name in asked if name not in formats}
    if formats:
        [(n, k)] = sizes.values()
        print(json.dumps({name: count_of_format(mesh, chip, n, k, name) for name in formats}))
    else:
        print(json.dumps({size: count(mesh, chip, *each) for size, each in sizes.items()}))
