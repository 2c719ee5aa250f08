"""The three-level loop of whole models compiled for chips that are not here; what it takes is kept in benchmarks/results/aot.json.

Needs the `aot` extra. Takes long, so that CI leaves it out.
"""

import json
import math
import pathlib
from importlib import metadata

import chips
import jax.numpy as jnp
import pytest
from hlo import HOST_OPERATIONS, aliased, decoded
from programs import LLAMA_1B, LLAMA_3B, LLAMA_8B, compile_stack
from test_aot_kernels import LARGE, SMALL, bundles

from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.formats import FORMATS

pytestmark = pytest.mark.aot_full
RESULTS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "aot.json"
BATCH, SIZE = 1, 1280
NAMES = {LLAMA_8B: "Llama-3.1-8B", LLAMA_3B: "Llama-3.2-3B", LLAMA_1B: "Llama-3.2-1B"}


def record(kind, name, facts):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"programs": {}, "bundles": {}}
    results.setdefault(kind, {})[name] = facts
    packages = ("jax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
    results |= {"command": "python -m pytest -n 0 -m aot_full", "versions": {name: metadata.version(name) for name in packages}}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    ("chip", "target", "small", "dtype"),
    [
        ("v5e:1x1", LLAMA_3B, LLAMA_1B, jnp.bfloat16),
        ("v6e:1x1", LLAMA_8B, LLAMA_1B, jnp.bfloat16),
        ("v5e:2x4", LLAMA_8B, LLAMA_1B, jnp.bfloat16),
        ("H200", LLAMA_8B, LLAMA_1B, jnp.bfloat16),
        ("A100", LLAMA_8B, LLAMA_1B, jnp.bfloat16),
        ("L4", LLAMA_8B, LLAMA_1B, jnp.bfloat16),
        ("T4", LLAMA_1B, LLAMA_1B, jnp.float16),
    ],
)
def test_whole_models(chip, target, small, dtype):
    mesh = chips.mesh(chip)
    program = compile_stack(mesh, target, small, BATCH, SIZE, dtype)
    memory, hlo = program.memory_analysis(), program.as_text()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    facts = {
        "draft": NAMES[small],
        "devices": mesh.size,
        "dtype": jnp.dtype(dtype).name,
        "argument bytes a device": memory.argument_size_in_bytes,
        "temporary bytes a device": memory.temp_size_in_bytes,
        "updated in place": memory.alias_size_in_bytes,
        "share of memory": round(used / chips.MEMORY[chip.partition(":")[0]], 3),
    }
    record("programs", f"{NAMES[target]} on {chip}", facts)
    assert used < chips.MEMORY[chip.partition(":")[0]]
    assert not HOST_OPERATIONS.search(hlo)
    assert "f64[" not in hlo
    tensors = [tensor for config in (target, small) for tensor in Network(config).tensors().values()]
    weights = [tensor.shape for tensor in tensors if len(tensor.shape) == 2]
    # The sums of a product that is split along K are as many as a small weight's elements.
    assert not decoded(hlo, {math.prod(shape) for shape in weights if math.prod(shape) > 2**20})
    mixer = target.layers[0].mixer
    cache = (BATCH, mixer.kv_heads // math.gcd(mesh.size, mixer.kv_heads), SIZE, mixer.head_dim)
    caches, in_place = aliased(hlo, "bf16" if dtype == jnp.bfloat16 else "f16", cache)
    assert len(caches) >= 2 * len(target.layers)
    assert in_place == caches


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_bundles_of_the_tpu_kernel(chip):
    found = bundles(chip, LARGE, SMALL, "3584x18944", "1024x1024")
    record("bundles", chip, found)
    assert all(each["8"]["mxfp4"] <= 1.2 * each["8"]["bf16"] for each in found.values())
    assert found[LARGE]["8"]["mxfp4"] <= found[LARGE]["memory cycles"]


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_bundles_of_other_formats(chip):
    """Where decoding takes longer than memory does for the packed weight, it takes less than memory does for one in bfloat16."""
    found = bundles(chip, "4096x4096", *FORMATS)
    record("formats", chip, found)
    for name, each in found.items():
        assert each["8"] <= 0.7 * each["memory cycles in bf16"], name
        assert each["16"] <= 0.8 * each["memory cycles in bf16"], name
