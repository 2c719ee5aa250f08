"""Products of quantized weights compiled for their chips, MXFP4's at the shapes of three models, and the cost of decoding on TPU.

Needs the `aot` extra (the compilers of both vendors, without drivers). Nothing is run.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import chips
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from programs import LLAMA_8B, QWEN3_06B, QWEN25_7B, on_mesh

from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.formats import FORMATS
from mlspecqd_jax.weights.products import multiply
from mlspecqd_jax.weights.quantization import with_head
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import best_product, chip_of

pytestmark = pytest.mark.aot
ROOT = pathlib.Path(__file__).resolve().parents[2]
LARGE, SMALL = "4096x14336", "1024x4096"  # of whose weights a step of the grid takes blocks of different sizes
MODELS = {"Llama-3.1-8B": LLAMA_8B, "Qwen2.5-7B": QWEN25_7B, "Qwen3-0.6B": QWEN3_06B}
TPU_ROWS, GPU_ROWS = (1, 16, 40), (1, 40)  # one for each kernel
SOME = LLAMA_8B.hidden_size, LLAMA_8B.layers[0].feed.size


def shapes(config) -> list[tuple[int, int]]:
    """Return the different [N, K] of a model's quantized weights, its head (tied or not) included."""
    return sorted({tensor.shape for tensor in with_head(Network(config).tensors()).values() if tensor.linear})


def compiled(mesh, n: int, k: int, rows: int, dtype=jnp.bfloat16, spec=(None, None), format="mxfp4"):
    """Compile the product that is chosen for the mesh's chip; return it and its name."""
    chip, parts = chip_of(mesh.devices.flat[0]), [1 if axis is None else mesh.shape[axis] for axis in spec]
    product = best_product(chip, jnp.dtype(dtype).name, n, k, *parts, format=format)
    stored = jax.eval_shape(functools.partial(quantize, format=format), jax.ShapeDtypeStruct((n, k), jnp.bfloat16)).core
    how = {"format": FORMATS[format], "along_n": parts[0], "along_k": parts[1]}
    arrays = jax.eval_shape(functools.partial(product.arrange, **how), **stored)
    leaf = on_mesh(QuantizedArray(arrays, (n, k), format, product.name, PartitionSpec(*spec), chip), mesh)
    x = jax.ShapeDtypeStruct((rows, k), dtype, sharding=NamedSharding(mesh, PartitionSpec(None, spec[1])))
    return chips.compile_for(mesh, multiply, x, leaf), product.name


def assert_stays_packed(program, n, k, format="mxfp4"):
    """Half of what the weight would take in bfloat16 is not there to hold it; a scale in float16 may have become a float32."""
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < n * k
    wider = 2 * n * k / FORMATS[format].group if FORMATS[format].scale == "float16" else 0
    stored = FORMATS[format].nbytes(n, k) + (1 + FORMATS[format].minimum) * wider
    assert memory.argument_size_in_bytes < 1.1 * stored + 2**20


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("chip", "product", "rows"), [("v5e:1x1", "tpu", TPU_ROWS), ("H200", "gpu", GPU_ROWS)])
def test_every_kernel_at_every_shape(chip, product, rows, model):
    mesh = chips.mesh(chip)
    for n, k in shapes(MODELS[model]):
        for m in rows:
            program, name = compiled(mesh, n, k, m)
            assert name == product
            assert_stays_packed(program, n, k)


@pytest.mark.parametrize(
    ("chip", "product", "rows"),
    [
        ("v6e:1x1", "tpu", TPU_ROWS),
        ("v5p:1x1x1", "tpu", TPU_ROWS),
        ("tpu7x:1x1x1", "tpu", TPU_ROWS),
        ("A100", "gpu", GPU_ROWS),
        ("L4", "gpu", GPU_ROWS),
        ("v4:1x1x1", "grouped", (1, 8)),
        ("v2:1x1", "grouped", (1,)),
        ("T4", "reduced", (1, 8)),
    ],
)
def test_every_product_on_every_chip(chip, product, rows):
    mesh = chips.mesh(chip)
    dtype = jnp.float16 if chip == "T4" else jnp.bfloat16
    for m in rows:
        program, name = compiled(mesh, *SOME, m, dtype)
        assert name == product
        assert_stays_packed(program, *SOME)


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "mxfp4"])
@pytest.mark.parametrize(("chip", "product"), [("v5e:1x1", "tpu table"), ("H200", "gpu table")])
def test_every_format(chip, product, format):
    mesh, (n, k) = chips.mesh(chip), (2880, 4096)  # the first is no multiple of 128
    for m in (1, 40) if format == "nvfp4" else (1,):
        program, name = compiled(mesh, n, k, m, format=format)
        assert name == product
        assert_stays_packed(program, n, k, format)


@pytest.mark.parametrize("n", [2880, 576])
def test_outputs_in_no_whole_128s(n):
    """XLA would store such codes with K last on TPU, and copy them for a kernel."""
    program, _ = compiled(chips.mesh("v5e:1x1"), n, 4096, 1)
    assert " copy(" not in program.as_text()


@pytest.mark.parametrize("spec", [("model", None), (None, "model"), (None, None)])
def test_split_over_four_chips(spec):
    """A quarter of the weight on each, and no exchange but one sum where K is split."""
    mesh, (n, k) = chips.mesh("v5e:2x2"), SOME
    program, name = compiled(mesh, n, k, 1, spec=spec)
    assert name == "tpu"
    memory, share = program.memory_analysis(), 1 if spec == (None, None) else 4
    assert memory.argument_size_in_bytes < 1.1 * n * k * 17 / 32 / share + 2**20
    hlo = program.as_text()
    assert ("all-reduce" in hlo) == (spec[1] is not None)
    assert not [word for word in ("all-gather(", "all-to-all(", "collective-permute(") if word in hlo]


@functools.cache
def bundles(chip, *asked):
    """Return what tests/bundles.py counts at some shapes, or at one of some formats."""
    chips.mesh(f"{chip}:1x1")  # or skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests" / "bundles.py"), chip, *asked]
    process = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_decoding_costs_few_bundles(chip):
    """At most 1.2 times those of a BF16 kernel; where the blocks are large, fewer than the cycles that memory takes for them."""
    found = bundles(chip, LARGE, SMALL)
    for size, each in found.items():
        assert each["8"]["mxfp4"] <= 1.2 * each["8"]["bf16"], size
    large = found[LARGE]
    assert large["8"]["mxfp4"] <= large["memory cycles"]
    assert large["16"]["mxfp4"] <= 1.2 * large["16"]["bf16"]
