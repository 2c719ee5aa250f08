"""The three-level loop of whole models compiled for chips that are not here; what it takes is kept in benchmarks/results/aot.json.

Needs the `aot` extra. Takes long, so that CI leaves it out.
"""

import json
import math
import pathlib
import time

import chips
import jax.numpy as jnp
import pytest
from hlo import HOST_OPERATIONS, aliased, decoded
from programs import LLAMA_1B, LLAMA_3B, LLAMA_8B, QWEN3_06B, compile_stack

from mlspecqd_jax.transformer import LanguageModel

pytestmark = pytest.mark.aot_full
RESULTS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "aot.json"
BATCH, SIZE = 1, 1280
NAMES = {LLAMA_8B: "Llama-3.1-8B", LLAMA_3B: "Llama-3.2-3B", LLAMA_1B: "Llama-3.2-1B", QWEN3_06B: "Qwen3-0.6B"}


def record(chip, name, facts):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"command": "python -m pytest -m aot_full", "programs": {}}
    results["programs"][f"{name} on {chip}"] = facts
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
    mesh, began = chips.mesh(chip), time.perf_counter()
    program = compile_stack(mesh, target, small, BATCH, SIZE, dtype)
    took, memory, hlo = time.perf_counter() - began, program.memory_analysis(), program.as_text()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    facts = {
        "draft": NAMES[small],
        "devices": mesh.size,
        "dtype": jnp.dtype(dtype).name,
        "seconds to compile": round(took),
        "argument bytes a device": memory.argument_size_in_bytes,
        "temporary bytes a device": memory.temp_size_in_bytes,
        "updated in place": memory.alias_size_in_bytes,
        "share of memory": round(used / chips.MEMORY[chip.partition(":")[0]], 3),
    }
    record(chip, NAMES[target], facts)
    assert used < chips.MEMORY[chip.partition(":")[0]]
    assert not HOST_OPERATIONS.search(hlo)
    assert "f64[" not in hlo
    weights = [shape for config in (target, small) for shape in LanguageModel(config).shapes().values() if len(shape) == 2]
    assert not decoded(hlo, {math.prod(shape) for shape in weights})
    cache = (BATCH, target.num_key_value_heads // math.gcd(mesh.size, target.num_key_value_heads), SIZE, target.head_dim)
    caches, in_place = aliased(hlo, "bf16" if dtype == jnp.bfloat16 else "f16", cache)
    assert len(caches) >= 2 * target.num_hidden_layers
    assert in_place == caches
