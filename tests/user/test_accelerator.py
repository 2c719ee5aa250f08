"""The benchmark for one GPU or TPU, at sizes that a CPU manages: it runs, checks its products, and says what it measured."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from compiling import quick_flags

from mlspecqd_jax.weights.formats import FORMATS

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ["--layers", "tiny", "--rows", "1", "8", "--bytes", "65536", "--trials", "1", "--model", "tiny", "--new-tokens", "8"]
REST = ["--draft-len", "2", "--budget", "3600"]  # seconds: nothing is left out
REAL = ["--checkpoint", "demo-small", "--drafts", "mxfp4:5 ngram:3", "--batches", "1", "2", "--prompts", "2"]


def measured(tmp_path, *parts):
    """Return what the benchmark saves of some of its parts."""
    out = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/accelerator.py", *SMALL, *REAL, *REST, "--parts", *parts, "--out", str(out)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MLSPECQD_CPU_KERNELS": "0"} | quick_flags()
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr + process.stdout
    result = json.loads(out.read_text())
    assert all(result[part]["platform"] == "cpu" and result[part]["left_out"] == [] for part in parts)
    return result


@pytest.mark.slow
def test_it_measures_products_and_exactness(tmp_path):
    result = measured(tmp_path, "kernels", "formats", "experts", "exactness")
    products = result["kernels"]["products"]
    assert len(products) == 2 * 2 * 2  # shapes, rows, formats
    assert {run["product"] for run in products} == {"mxfp4 (decoded)", "bf16"}
    assert all(run["error"] < 1e-5 and run["seconds"] > 0 for run in products)
    formats = result["formats"]["products"]
    assert {run["product"] for run in formats} == {"bf16", *(f"{name} (decoded)" for name in FORMATS)}
    assert all(run["error"] < 1e-2 and run["seconds"] > 0 for run in formats)  # which decoding rounds to bfloat16
    experts = result["experts"]["products"]
    assert {(run["product"], run["rows"]) for run in experts} == {(name, rows) for name in ("bf16", "mxfp4") for rows in (1, 8)}
    assert all(run["error"] < 1e-5 and 2 <= run["distinct_experts"] <= 4 for run in experts)
    judged = result["exactness"]["runs"]
    assert len(judged) == 3 * 2 * 2  # stacks, batches, temperatures
    alike = [run for run in judged if run["stack"] != "plain, exact=False"]
    assert all(run["rows"] == 2 and run["unlike_plain"] == run["unlike_plain_alone"] == 0 for run in alike)


@pytest.mark.exhaustive
def test_it_measures_programs(tmp_path):
    runs = measured(tmp_path, "programs")["programs"]["runs"]
    assert {run["stack"] for run in runs} == {"plain", "twin", "nested", "the twin alone"}
    assert {run["exact"] for run in runs} == {True, False}
    assert all(run["tokens_per_second"] > 0 for run in runs)
