"""Imports point down, by room: the recursion never imports the network, and the two towers meet in `stacks` alone."""

import ast
import graphlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
KERNELS = ("pallas_kernels", "cpu_kernels")
GROUND = (
    "arguments",
    "console",
    "errors",
    "fingerprints",
    "folds",
    "jax_settings",
    "json_files",
    "kept_programs",
    "kept_values",
    "prompt_files",
    "stopwatch",
    "user_cache",
)  # files, not rooms: they import each other alone
# What a room may import beside itself, the ground and what those rooms may; on the left are folders and files of the package.
BELOW = {
    "text": (),
    "speculation": (),
    "requests": ("speculation", "text"),
    "report": ("speculation",),
    "programs": ("speculation",),
    "generation": ("plans", "programs", "report", "requests"),
    "weights": KERNELS,
    "network": ("weights",),
    "loading": ("network", "text"),
    "planner": ("loading", "plans"),
    "sensitivity_table": (),
    "pass_times": ("speculation",),
    "plans": ("speculation",),
    "stacks": ("loading", "pass_times", "planner", "plans", "speculation"),
    "pass_measurement": ("generation",),
    "replay": ("generation", "loading"),
    "planning": ("pass_measurement", "replay", "stacks"),
    "specs": ("stacks",),
    "options": (),
    "cli": ("generation", "options", "planner", "planning", "sensitivity_table", "specs"),
    "examples": ("cli",),
    "benchmarks": ("cli",),
    "pallas_kernels": (),
    "cpu_kernels": (),
}


def reachable(room: str) -> set[str]:
    """Return the rooms that one may import, itself among them."""
    found = {room}
    for below in BELOW.get(room, ()):
        found |= reachable(below)
    return found if room in KERNELS else found | {"ground"}


def modules(source: str) -> set[str]:
    """Return what of the project a source file imports, at any depth of its code: modules, or names in them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("mlspecqd_jax", *KERNELS)}


def room_of(module: str) -> str:
    """Return the room of a module or of a name in one; the package itself is in none."""
    parts = module.split(".")
    room = parts[0] if parts[0] != "mlspecqd_jax" else ".".join(parts[1:2])
    return "ground" if room in GROUND else room


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def rooms(source: str) -> set[str]:
    """Return the rooms that a source file imports."""
    return {room_of(module) for module in modules(source)} & {"ground", *BELOW}


def violations(room: str, source: str) -> list[str]:
    """Return the rooms that a file of a room imports although it must not."""
    return sorted(rooms(source) - reachable(room))


def files():
    for folder in ("mlspecqd_jax", *KERNELS, "examples", "benchmarks"):
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if path != ROOT / "mlspecqd_jax" / "__init__.py")


@pytest.mark.parametrize("path", list(files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(module_of(path))
    assert room == "ground" or room in BELOW, f"{path.name} has no room yet; add it to BELOW"
    assert violations(room, path.read_text(encoding="utf-8")) == []


def test_files_import_in_no_circle():
    names = {module_of(path): modules(path.read_text(encoding="utf-8")) for path in files()}
    graph = {module: {name if name in names else name.rpartition(".")[0] for name in found} for module, found in names.items()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(names)
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(graph | {"mlspecqd_jax.arguments": {"mlspecqd_jax.cli"}}).static_order())


def test_the_towers_stand_apart():
    assert reachable("speculation") == {"speculation", "ground"}
    assert not {"loading", "network", "weights", "stacks", *KERNELS} & reachable("generation")
    assert "speculation" not in reachable("loading")
    assert {"loading", "speculation", "network", "weights", *KERNELS} < reachable("cli")


@pytest.mark.parametrize("path", [path for path in files() if room_of(module_of(path)) in KERNELS], ids=lambda path: path.stem)
def test_kernels_use_jax_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    heads = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    heads |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert heads <= {"jax", path.parent.name} | sys.stdlib_module_names


def test_a_violation_is_seen():
    assert violations("network", "def f():\n    from mlspecqd_jax import generation") == ["generation"]
    assert violations("speculation", "from mlspecqd_jax.network.network import KVCache") == ["network"]
    assert violations("weights", "import mlspecqd_jax.speculation.loop as s") == ["speculation"]
    assert violations("speculation", "import cpu_kernels") == ["cpu_kernels"]
    assert violations("generation", "import mlspecqd_jax.loading.models, pallas_kernels") == ["loading", "pallas_kernels"]
    assert violations("cli", "import mlspecqd_jax.loading.models, pallas_kernels") == []
