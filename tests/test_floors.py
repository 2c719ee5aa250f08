"""Imports point down: each module may use those below it, the algorithm never the network, floor 0 jax and the standard library."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# From the ground up; a module may import modules of the lines before its own, and of its own line those to its left.
FLOORS = (
    ("pallas_kernels", "cpu_kernels"),
    ("arguments", "json_files", "render_templates", "chat", "tokenizer_files"),
    (
        "settings",
        "console",
        "prompt_files",
        "buffers",
        "folds",
        "predictions",
        "moves",
        "mxfp4",
        "partition",
        "placement",
        "layouts",
        "matmul",
        "norms",
        "quantization",
        "rope",
        "text",
    ),
    ("attention", "transformer", "sampling", "verification"),
    ("config_file", "weight_files", "huggingface", "checkpoint", "levels", "prompt_lookup", "speculation"),
    ("models", "defaults", "stacks", "specs", "report", "api"),
    ("cli", "examples", "benchmarks"),
)
ORDER = [name for floor in FLOORS for name in floor]
ALGORITHM = {
    "arguments",
    "settings",
    "buffers",
    "folds",
    "sampling",
    "verification",
    "levels",
    "prompt_lookup",
    "speculation",
}
NETWORK = {
    "mxfp4",
    "layouts",
    "matmul",
    "norms",
    "partition",
    "placement",
    "quantization",
    "rope",
    "moves",
    "attention",
    "transformer",
    "config_file",
    "weight_files",
    "huggingface",
    "checkpoint",
}
KERNELS = ("pallas_kernels", "cpu_kernels")
NETWORK |= set(KERNELS)


def imported(source: str) -> set[str]:
    """Return the project's modules that a source file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head in KERNELS:
                found.add(head)
            elif head == "mlspecqd_jax":
                found.add(rest.split(".")[0])
    return found & set(ORDER)


def violations(module: str, source: str) -> list[str]:
    """Return what a module imports although it must not."""
    rank = ORDER.index(module)
    wrong = {name for name in imported(source) if ORDER.index(name) >= rank}
    if module in ALGORITHM:
        wrong |= imported(source) & NETWORK
    return sorted(wrong)


def modules():
    for path in sorted((ROOT / "mlspecqd_jax").glob("*.py")):
        if path.stem != "__init__":
            yield path.stem, path
    for folder in ("examples", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            yield folder, path


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda x: x.stem if isinstance(x, pathlib.Path) else x)
def test_imports_point_down(module, path):
    assert module in ORDER, f"{path.name} has no floor yet; add it to FLOORS"
    assert violations(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [path for name in KERNELS for path in sorted((ROOT / name).glob("*.py"))], ids=lambda p: p.stem)
def test_floor_0_uses_jax_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    heads = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    heads |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert heads <= {"jax", path.parent.name} | sys.stdlib_module_names


def test_a_violation_is_seen():
    assert violations("matmul", "def f():\n    from mlspecqd_jax import api") == ["api"]
    assert violations("speculation", "from mlspecqd_jax.network.transformer import KVCache") == ["transformer"]
    assert violations("sampling", "import mlspecqd_jax.speculation.loop as s") == ["speculation"]
    assert violations("api", "import mlspecqd_jax.models, pallas_kernels") == []
