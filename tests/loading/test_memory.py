"""What importing a checkpoint of 1.1 billion parameters costs: the process never holds a second model."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_an_import_holds_one_model_and_two_tensors_at_most(tmp_path):
    command = [sys.executable, "benchmarks/loading.py", "--trials", "1", "--out", tmp_path / "result.json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["model_bytes"] > 2 * 1.09e9
    assert found["peak_anonymous_bytes"]["import"] <= found["model_bytes"] + found["largest_two_tensors_bytes"]
    assert found["peak_anonymous_bytes"]["load"] <= found["largest_two_tensors_bytes"]
