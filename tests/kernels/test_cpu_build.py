"""Compiling the C++ products on first use: once, for all processes; and what happens where it cannot be done."""

import os
import pathlib
import shutil
import stat
import subprocess
import sys

import pytest

from cpu_kernels import build
from cpu_kernels.library import UNITS

ROOT = pathlib.Path(__file__).resolve().parents[2]
exhaustive = pytest.mark.exhaustive
needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")

# A compiler that takes its time and writes what counts the times it ran; the libraries themselves come from this session's cache.
STAND_IN = """#!/bin/sh
echo ran >> "{log}"
sleep 0.5
for last; do case "$last" in *.cc) unit=$(basename "$last" .cc);; esac; done
case "$unit" in
{copies}
esac
"""
PRODUCT = """
import jax.numpy as jnp
from mlspecqd_jax.network import ops
print(ops.implementation("cpu"))
for _ in range(2):
    print(ops.linear(jnp.ones((2, 3, 40), jnp.bfloat16), jnp.ones((5, 40), jnp.bfloat16), out_dtype=jnp.float32).sum())
"""
# 64 bytes of scores a slot for either head, on the threads of a pool; the first and the last call see one slot.
SCORES = """
import resource
import jax, jax.numpy as jnp
import cpu_kernels
slots = 1 << 22
q, first = jnp.ones((1, 2, 1, 1), jnp.bfloat16), jnp.zeros((1, 1), jnp.int32)
kv = jnp.ones((1, 2, slots, 1), jnp.bfloat16)
attend = jax.jit(cpu_kernels.attention)
print(attend(q, kv, kv, first, first).tolist())
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (slots << 5), resource.RLIM_INFINITY))
try:
    attend(q, kv, kv, first, first + slots - 1).block_until_ready()
except (jax.errors.JaxRuntimeError, ValueError) as error:  # the first, by its documentation
    print(str(error).splitlines()[0])
print(attend(q, kv, kv, first, first).tolist())
"""
ASKED = ("bfloat16", "mx")  # the units that it needs
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror", "-O1")  # here and not in a user's build, whose compiler may know newer ones
XLA, CPP = "XLA dot, at least two rows\n1200.0\n1200.0\n", "C++ for bfloat16"


def start(cache, program=PRODUCT, **environment):
    command = [sys.executable, "-c", program]
    environment = (
        {k: v for k, v in os.environ.items() if k not in ("CXX", build.SWITCH)}
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(cache),
        }
        | {k: str(v) for k, v in environment.items()}
    )
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, [line for line in err.splitlines() if line.startswith("mlspecqd")]


@pytest.fixture
def stand_in(tmp_path):
    """Return (path of a compiler, function that counts how often it ran)."""
    log, script = tmp_path / "log", tmp_path / "compiler"
    libraries = zip(ASKED, build.library_paths(ASKED), strict=True)  # the cache may hold those of other versions too
    script.write_text(STAND_IN.format(log=log, copies="\n".join(f'{unit}) cp "{path}" "$last";;' for unit, path in libraries)))
    script.chmod(0o755)
    return script, lambda: len(log.read_text().splitlines())


@pytest.mark.slow
@needs_compiler
def test_two_processes_that_start_together_compile_once(tmp_path, stand_in):
    compiler, runs = stand_in
    processes = [start(tmp_path / "cache", CXX=compiler) for _ in range(2)]
    outcomes = [outcome(process) for process in processes]
    assert all(out.startswith(CPP) and out.endswith("1200.0\n1200.0\n") for out, _ in outcomes)
    assert runs() == len(ASKED)
    assert sorted(len(said) for _, said in outcomes) in ([0, 1], [1, 1])  # who compiles says so once, and there are two units
    suffixes = sorted(file.suffix for file in (tmp_path / "cache/mlspecqd-jax/cpu_kernels").iterdir())
    assert suffixes == [".lock", *(".so" for _ in ASKED)]
    assert outcome(start(tmp_path / "cache", CXX=compiler))[1] == []  # a later process finds it
    assert runs() == len(ASKED)


@pytest.mark.slow
@needs_compiler
def test_a_cache_that_cannot_be_written_costs_one_compilation_a_process(tmp_path, stand_in):
    compiler, runs = stand_in
    (tmp_path / "file").write_text("not a folder")
    out, said = outcome(start(tmp_path / "file" / "cache", CXX=compiler, TMPDIR=tmp_path))
    assert out.startswith(CPP)
    assert runs() == len(ASKED)
    assert len(said) == 2
    assert "cannot be written" in said[0]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PATH": "/nowhere"}, "no C++ compiler found"),
        ({"CXX": "false"}, "cannot be compiled, so XLA's own products run, which are slower (exit code 1)"),
        pytest.param({build.SWITCH: "0"}, None, marks=pytest.mark.slow),
    ],
)
def test_without_a_library_xla_runs_and_that_is_said_once(tmp_path, environment, said):
    out, lines = outcome(start(tmp_path, **environment))
    assert out == XLA
    assert [said in line for line in lines if "compiling" not in line] == ([] if said is None else [True])


@needs_compiler
def test_a_compiler_that_complains_is_quoted(tmp_path):
    complaint = build.compile_library(build.find_compiler(), "six_bits", tmp_path / "out.so", ("-fno-such-thing",))
    assert "no-such-thing" in complaint
    assert not (tmp_path / "out.so").exists()


def test_the_units_are_the_files():
    assert sorted(UNITS) == sorted(file.stem for file in build.SOURCE.glob("*.cc"))


def test_the_compiler_is_cxx_or_the_first_that_is_there(tmp_path, monkeypatch):
    for name in ("clang++", "mine"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.find_compiler() == (str(tmp_path / "clang++"),)
    monkeypatch.setenv("CXX", "mine -march=old")
    assert build.find_compiler() == (str(tmp_path / "mine"), "-march=old")
    monkeypatch.setenv("CXX", "gone")
    assert build.find_compiler() == (str(tmp_path / "clang++"),)


def test_the_name_of_the_library_follows_the_source(tmp_path, monkeypatch):
    before = build._key(("g++",))
    assert build._key(("clang++",)) != before
    shutil.copytree(build.SOURCE, tmp_path / "src")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "src")
    assert build._key(("g++",)) == before
    with open(tmp_path / "src" / "parallel.h", "a") as file:
        file.write("\n")
    assert build._key(("g++",)) != before


@needs_compiler
@pytest.mark.slow
def test_the_portable_form_alone(tmp_path):
    """What other processors get, as if this were one."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {build.find_compiler()[0]} -DMLSPECQD_PORTABLE "$@" -O0\n')
    compiler.chmod(0o755)
    out, _ = outcome(start(tmp_path, CXX=compiler))
    assert out.startswith("C++ for bfloat16 (portable), float16 and float32, for mxfp4 (portable")
    assert out.endswith("1200.0\n1200.0\n")


@needs_compiler
@pytest.mark.slow
# What takes least in all: one of them slows the compiler, the other the run.
@pytest.mark.parametrize(("sanitizers", "level"), [("address,undefined", "-O0"), ("thread", "-O1")])
def test_sanitizers_find_nothing(tmp_path, sanitizers, level):
    """Every instruction set on odd sizes in buffers of exact length, from two threads at once, over a pool."""
    compiler, harness = build.find_compiler(), tmp_path / "harness"
    flags = ("-std=c++17", level, "-g1", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{build.SOURCE}")
    subprocess.run([*compiler, *flags, ROOT / "tests/cpu_kernels_harness.cc", "-o", harness], check=True)
    process = subprocess.run([harness], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.endswith("done\n")


@pytest.mark.slow
@pytest.mark.parametrize("form", [(), pytest.param(("-DMLSPECQD_PORTABLE",), marks=exhaustive)], ids=["all", "portable"])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
# The units of other floats are bfloat16's with another type.
@pytest.mark.parametrize(
    "unit", [pytest.param(unit, marks=exhaustive if unit.startswith("float") else ()) for unit in sorted(UNITS)]
)
def test_no_compiler_warns(tmp_path, compiler, unit, form):
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    assert build.compile_library((compiler,), unit, tmp_path / "out.so", (*WARNINGS, *form)) is None


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space that holds")
def test_memory_that_cannot_be_had_is_an_error_of_the_call(tmp_path):
    """Attention's scores are the only memory that grows with what is seen; a process that may not have it goes on."""
    process = start(tmp_path, program=SCORES, XDG_CACHE_HOME=os.environ["XDG_CACHE_HOME"])
    out, _ = outcome(process)
    assert out == "[[[[1.0], [1.0]]]]\nRESOURCE_EXHAUSTED: out of memory\n[[[[1.0], [1.0]]]]\n"
