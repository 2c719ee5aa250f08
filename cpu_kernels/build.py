"""Compiles the C++ source on first use into the user's cache, with the compiler that is found.

The wheel holds no binary. Each `.cc` file is a unit, which makes a library. It has every instruction set of the processor's family
in it, so the name of its file is made of what it depends on: the source, the flags, jax (whose headers it is compiled with), the
machine, its C library, the compiler.
"""

import atexit
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import jax

SOURCE = pathlib.Path(__file__).parent / "src"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
SWITCH = "MLSPECQD_CPU_KERNELS"  # 0 switches the kernels off


@functools.cache
def library_paths(units: tuple[str, ...]) -> tuple[pathlib.Path, ...] | None:
    """Return the compiled libraries of some units, compiling what is not there; None, and a line why, if it cannot.

    The answer stands for the process, so nothing is tried or said twice.
    """
    if os.environ.get(SWITCH) == "0" or os.name != "posix":
        return None
    compiler = find_compiler()
    if compiler is None:
        say("no C++ compiler found (CXX, g++, clang++): XLA's own products run, which are slower; install one, such as g++")
        return None
    folder, key = cache_folder(), _key(compiler)
    libraries = tuple(folder / f"{unit}-{key}.so" for unit in units)
    if all(library.is_file() for library in libraries):
        return libraries
    if not _can_write(folder):
        folder = pathlib.Path(tempfile.mkdtemp(prefix="mlspecqd-cpu-kernels-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        say(f"the cache folder {cache_folder()} cannot be written, so the CPU kernels are compiled for this process alone")
        libraries = tuple(folder / library.name for library in libraries)
    return libraries if _build_once(compiler, units, libraries, folder / f"{key}.lock") else None


def find_compiler() -> tuple[str, ...] | None:
    """Return the command of the C++ compiler: CXX, which may hold arguments too, or else g++ or clang++; None if there is none."""
    for command in (os.environ.get("CXX", ""), "g++", "clang++"):
        words = shlex.split(command)
        if words and (found := shutil.which(words[0])):
            return (found, *words[1:])
    return None


def cache_folder() -> pathlib.Path:
    """Return the folder in the user's cache that holds compiled libraries."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "mlspecqd-jax" / "cpu_kernels"


def compile_library(compiler: tuple[str, ...], unit: str, output: pathlib.Path, flags: tuple[str, ...] = ()) -> str | None:
    """Compile a unit to `output`; return None, or the compiler's first complaint."""
    include = ("-isystem", jax.ffi.include_dir())
    command = [*compiler, *FLAGS, *flags, *include, str(SOURCE / f"{unit}.cc"), "-o", str(output)]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if process.returncode == 0:
        return None
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {process.returncode}")


@functools.cache
def say(text: str) -> None:
    """Print one line to stderr, once."""
    print(f"mlspecqd: {text}", file=sys.stderr, flush=True)


def _key(compiler: tuple[str, ...]) -> str:
    parts = [*compiler, *FLAGS, jax.__version__, platform.machine(), *platform.libc_ver()]
    parts += [file.read_text(encoding="utf-8") for file in sorted(SOURCE.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _can_write(folder: pathlib.Path) -> bool:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _build_once(compiler: tuple[str, ...], units: tuple[str, ...], libraries: tuple[pathlib.Path, ...], lock: pathlib.Path) -> bool:
    """Compile units side by side under a lock, so that of several processes one compiles; each library appears all at once."""
    import fcntl

    def build(unit, library):
        part = library.with_suffix(f".{os.getpid()}.part")
        complaint = compile_library(compiler, unit, part)
        if complaint is None:
            part.replace(library)
        part.unlink(missing_ok=True)
        return complaint

    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as held, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        missing = [pair for pair in zip(units, libraries, strict=True) if not pair[1].is_file()]
        if missing:
            say(f"compiling the CPU kernels with {os.path.basename(compiler[0])}, once; this takes some seconds")
        complaint = next(filter(None, list(pool.map(lambda pair: build(*pair), missing))), None)
    if complaint is not None:
        say(f"the CPU kernels cannot be compiled, so XLA's own products run, which are slower ({complaint})")
    return complaint is None
