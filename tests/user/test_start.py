"""What a start costs: nothing is imported that it does not need, and `--profile` says where its seconds went."""

import ast
import pathlib
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from command import PLAIN, run

import mlspecqd_jax as mlsd
from mlspecqd_jax import stopwatch
from mlspecqd_jax.loading import huggingface

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMPORTED = """
import sys
import mlspecqd_jax as mlsd
assert "jax" not in sys.modules, "for the sake of a name"
assert set(mlsd.__all__) <= set(dir(mlsd))
for name in mlsd.__all__:
    getattr(mlsd, name)
import mlspecqd_jax.cli, mlspecqd_jax.specs
slow = {"transformers", "orbax", "matplotlib", "jax.experimental.pallas", "huggingface_hub"}
print(*sorted(slow & set(sys.modules)))
"""


def test_what_takes_long_to_import_is_imported_where_it_is_used():
    process = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout.strip()) == (0, ""), process.stderr


def test_the_names_that_type_checkers_are_told_are_those_that_are_found():
    tree = ast.parse((ROOT / "mlspecqd_jax" / "__init__.py").read_text(encoding="utf-8"))
    told = {
        (node.module.removeprefix("mlspecqd_jax."), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mlspecqd_jax.")
        for alias in node.names
    }
    assert told == {(module, name) for name, module in mlsd._MODULE_OF.items()}
    assert sorted(mlsd._MODULE_OF) == sorted(mlsd.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mlsd.nothing  # noqa: B018


def test_a_profile_says_where_the_seconds_went(capsys):
    code, _, err = run(capsys, "generate", *PLAIN, "--profile")
    assert code == 0
    rows = dict(re.findall(r"^(\S.*?) +(\d+\.\d\d +\d+\.\d\d)$", err, re.MULTILINE))
    steps = ["imports", "load the model", "drafts: quantize or load", "programs", "prefill, to the first text", "decode"]
    assert list(rows) == ["python, jax", *steps, "in all"]
    seconds = [float(row.split()[0]) for row in rows.values()]
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=0.05)


def test_parts_of_a_row_count_once():
    text = stopwatch.table({"one": (1.0, 2.0), "  of which": (0.5, 0.5), "two": (3.0, 4.0)})
    assert [line.split() for line in text.splitlines()][-1] == ["in", "all", "4.00", "6.00"]
    assert len({len(line) for line in text.splitlines()}) == 1


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_numbers_that_are_none_are_seen_by_their_bits(dtype, monkeypatch):
    monkeypatch.setattr(huggingface, "PART", 4)
    sound = np.array([[0, -0.0, 1, -1.5, 6e4], [ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min, 3e-5, 2, 3]], dtype)
    assert huggingface.all_finite(sound)
    assert huggingface.all_finite(sound[:, ::2])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for at in np.ndindex(sound.shape):
            broken = sound.copy()
            broken[at] = bad
            assert not huggingface.all_finite(broken), (bad, at)
