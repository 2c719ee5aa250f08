"""What ships: the pages with their tables, commands and links, the examples, and the wheel outside the tree."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from compiling import quick_flags

import cpu_kernels

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*command, cwd=ROOT, **environment):
    """Run a command and return its stdout."""
    process = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_tables_are_made_from_the_results():
    run(sys.executable, "benchmarks/tables.py", "--check")


@pytest.mark.parametrize(("page", "place"), [("README.md", "headlines"), ("benchmarks/README.md", "startup-cpu")])
@pytest.mark.slow
def test_a_stale_table_is_named_and_made_anew(tmp_path, page, place):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    text = (tmp_path / page).read_text(encoding="utf-8")
    (tmp_path / page).write_text(text.replace(f"<!-- {place} -->\n", f"<!-- {place} -->\nstale\n"), encoding="utf-8")
    command = [sys.executable, "benchmarks/tables.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    check = subprocess.run([*command, "--check"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert check.returncode == 1
    assert f"{place} in {page}" in check.stderr
    run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (tmp_path / page).read_text(encoding="utf-8") == text


def test_the_page_of_families_is_made_from_the_families_and_the_tests():
    run(sys.executable, "docs/family_table.py", "--check")


@pytest.mark.slow
def test_a_stale_page_of_families_is_named_and_made_anew(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    page, command = tmp_path / "docs" / "models.md", [sys.executable, tmp_path / "docs" / "family_table.py"]
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("| `phi3` |", "| `phi3`, `phi4` |"), encoding="utf-8")
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    check = subprocess.run([*command, "--check"], env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert check.returncode == 1
    assert "docs/models.md is not what the families and the tests say" in check.stderr
    run(*command, **environment)
    assert page.read_text(encoding="utf-8") == text


def anchors(page: pathlib.Path) -> set[str]:
    """Return the names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize(
    "page", ["README.md", "benchmarks/README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_of_the_pages_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in link:
            to, _, anchor = link.partition("#")
            target = path.parent / to if to else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_readme_is_short_and_the_source_distribution_has_the_rest():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]["sdist"]
    assert {"README.md", "docs", "benchmarks", "examples"} <= set(settings["include"])


def test_readme_has_the_two_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 -m venv .*$", text, flags=re.MULTILINE)
    assert len(commands) == 2
    assert "mlspecqd generate" in commands[0]
    assert "-m pytest" in commands[1]


def test_no_dependency_on_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [needed for extra in project["optional-dependencies"].values() for needed in extra]
    assert project["dependencies"]
    assert not [needed for needed in project["dependencies"] + extras if needed.startswith("torch")]


def test_demo_checkpoints_are_small():
    size = sum(file.stat().st_size for file in (ROOT / "checkpoints").rglob("*") if file.is_file())
    assert size <= 32_000_000


@pytest.mark.parametrize("draft_len", [pytest.param(0, marks=pytest.mark.exhaustive), pytest.param(2, marks=pytest.mark.slow)])
def test_jit_generate_example(draft_len):
    options = ["--model", "demo-small", "--samples", "2", "--max-new-tokens", "6", "--draft-len", str(draft_len)]
    out = run(sys.executable, "examples/jit_generate.py", *options, PYTHONPATH=str(ROOT), **quick_flags())
    assert "compiled 1 time(s) for 2 calls" in out
    assert out.count("mean log-probability") == 2
    assert "resumed to its end" in out


@pytest.mark.slow
def test_the_wheel_works_outside_the_tree(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    wheel = next(tmp_path.glob("mlspecqd_jax-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "cpu_kernels" / "src").iterdir()]
    assert len(sources) > 3
    kernels = [
        f"pallas_kernels/{name}.py" for name in ("reference", "xla", "tpu", "gpu", "fallbacks", "product", "products", "blocks")
    ]
    demos = [f"mlspecqd_jax/_demo/{name}/model.safetensors" for name in ("demo", "demo-small")]
    typed = [f"{package}/py.typed" for package in ("mlspecqd_jax", "pallas_kernels", "cpu_kernels")]
    for needed in ("mlspecqd_jax/cli.py", *kernels, *demos, *sources, *typed):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests/", "examples/", "benchmarks/"))]
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel)
    calls = [["generate", "--prompt", "def fibonacci(n):", "--max-new-tokens", "8"], ["info"]]
    script = f"import mlspecqd_jax; print(mlspecqd_jax.__file__); from mlspecqd_jax import cli; [cli.main(c) for c in {calls}]"
    where, _, rest = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).partition("\n")
    assert where.startswith(str(tmp_path / "site"))
    text, _, facts = rest.partition("model:")
    assert text.strip()
    assert "_demo" in facts
    assert ("C++ for bfloat16" in facts) == bool(cpu_kernels.isas("matmul"))
