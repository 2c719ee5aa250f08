"""Compiled programs that are kept: loaded without a trace, never where anything differs, and only if whole and one's own."""

import concurrent.futures
import functools
import os
import pathlib
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_options

import mlspecqd_jax as mlsd
from mlspecqd_jax import fingerprints, kept_programs, kept_values, programs, user_cache
from mlspecqd_jax.kept_programs import Kept
from mlspecqd_jax.loading import models

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Keep programs under a new folder, which it returns."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(user_cache.cache_folder(kept_values.JAX_KIND)))
    assert kept_values.keeping()
    found = user_cache.cache_folder(kept_programs.KIND)
    assert user_cache.why_not_own(found) is None
    yield found
    jax.config.update("jax_compilation_cache_dir", before)
    programs._kept.cache_clear()


class Counted:
    """A function that counts its traces, kept; each one made is as a process of its own."""

    def __init__(self, depends=(), **options):
        self.traces = 0
        self.kept = Kept("scaled", self.scaled, lambda x, y, **_: x, lambda *_, **__: depends, static="by", **options)

    def scaled(self, x, y, by=2):
        self.traces += 1
        return by * x + jnp.sum(y)

    def __call__(self, x=3.0, y=1.0, by=2, shape=(4,), dtype=np.float32):
        return np.asarray(self.kept(jnp.full(shape, x, dtype), jnp.full((2,), y, dtype), by=by)).tolist()


@pytest.fixture
def kept(folder):
    """The folder, with a program in it."""
    first = Counted()
    assert (first(), first(x=1.0), first.traces) == ([8.0] * 4, [4.0] * 4, 1)
    assert len(list(folder.iterdir())) == 1
    return folder


def test_it_is_loaded_without_a_trace(kept):
    later = Counted()
    assert (later(x=5.0), later.traces) == ([12.0] * 4, 0)
    assert [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (kept, *kept.iterdir())] == [0, 0]


def changed_environment(patch):
    patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")


CHANGES = {
    "shape": (lambda patch: None, {"shape": (4, 1)}, {}),
    "dtype": (lambda patch: None, {"dtype": np.float16}, {}),
    "static value": (lambda patch: None, {"by": 3}, {}),
    "donation": (lambda patch: None, {}, {"donate_argnums": (0,)}),
    "compiler option": (lambda patch: None, {}, {"compiler_options": {"xla_backend_optimization_level": 1}}),
    "depends": (lambda patch: None, {}, {"depends": ("another product",)}),
    "jax": (lambda patch: patch.setattr(jax, "__version__", "0.0"), {}, {}),
    "jaxlib": (lambda patch: patch.setattr(fingerprints.jaxlib, "__version__", "0.0"), {}, {}),
    "source": (lambda patch: patch.setattr(fingerprints, "source", lambda: "other"), {}, {}),
    "processor": (lambda patch: patch.setattr(fingerprints, "processor", lambda: ("other",)), {}, {}),
    "environment": (changed_environment, {}, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_differs_is_another_program(kept, monkeypatch, change):
    patch, arguments, options = CHANGES[change]
    patch(monkeypatch)
    later = Counted(**options)
    expected = np.full(arguments.get("shape", (4,)), arguments.get("by", 2) * 3.0 + 2.0).tolist()
    assert (later(**arguments), later.traces) == (expected, 1)
    assert len(list(kept.iterdir())) == 2


def test_another_setting_of_jax_is_another_program(kept):
    with jax.default_matmul_precision("highest"):
        later = Counted()
        later()
    assert later.traces == 1
    same = Counted()
    same()
    with jax.default_matmul_precision("float32"):
        same()
    assert same.traces == 1


def test_a_process_has_so_many_at_hand(kept, monkeypatch):
    monkeypatch.setattr(kept_programs, "MOST_PROGRAMS", 2)
    later = Counted()
    for n in (4, 5, 6, 5, 4):
        assert later(shape=(n,)) == [8.0] * n
        assert len(later.kept._programs) <= 2
    assert later.traces == 2  # of those that are on disk none is traced again


def damaged(data):
    yield "empty", b""
    yield "half", data[: len(data) // 2]
    yield "all but the last byte", data[:-1]
    yield "longer", data + b"\0"
    yield "a byte", data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    yield "another's name", data.replace(data[9:73], b"0" * 64)


def test_what_is_damaged_is_compiled_anew(kept):
    (path,) = kept.iterdir()
    good = path.read_bytes()
    for how, data in damaged(good):
        path.write_bytes(data)
        later = Counted()
        assert (later(), later.traces) == ([8.0] * 4, 1), how
        again = Counted()
        assert (again(), again.traces) == ([8.0] * 4, 0), how


def test_what_pickle_or_xla_cannot_read_is_compiled_anew(kept):
    (path,) = kept.iterdir()
    user_cache.write_own(path, path.name.removeprefix("scaled-"), b"no pickle")
    later = Counted()
    assert (later(), later.traces) == ([8.0] * 4, 1)


@pytest.mark.parametrize("how", ["file", "folder", "link", "owner"])
def test_what_others_may_have_written_is_not_read(kept, monkeypatch, tmp_path, how):
    (path,) = kept.iterdir()
    match how:
        case "file":
            path.chmod(0o666)
        case "folder":
            kept.chmod(0o777)
        case "link":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
        case "owner":
            monkeypatch.setattr(os, "getuid", lambda: 4321)
    monkeypatch.setattr(kept_programs.serialize_executable, "deserialize_and_load", lambda *_, **__: pytest.fail("read it"))
    later = Counted()
    assert (later(), later.traces) == ([8.0] * 4, 1)


def test_many_that_write_at_once_leave_it_whole(folder):
    path = folder / "one"
    texts = [bytes([i]) * 200_000 for i in range(8)]

    def write_and_read(text):
        user_cache.write_own(path, "one", text)
        return user_cache.read_own(path, "one")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write_and_read, texts * 6)) <= set(texts)
    assert [file.name for file in folder.iterdir()] == ["one"]


def test_the_ones_that_nobody_read_for_longest_go(folder, monkeypatch):
    monkeypatch.setattr(user_cache, "MOST_BYTES", 2000)
    for i, name in enumerate("abc"):
        user_cache.write_own(folder / name, name, b"x" * 700)
        os.utime(folder / name, (i, i))
    user_cache.read_own(folder / "b", "b")
    user_cache.write_own(folder / "d", "d", b"x" * 700)
    assert sorted(file.name for file in folder.iterdir()) == ["b", "d"]


@pytest.mark.parametrize(("place", "said"), [("file/cache", "cannot be made"), ("open", "others may write there")])
def test_without_a_folder_of_its_own_nothing_is_kept_and_one_line_says_so(tmp_path, monkeypatch, capsys, place, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "open" / "mlspecqd-jax").mkdir(parents=True)
    (tmp_path / "open" / "mlspecqd-jax").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    models._why_not_kept.cache_clear()
    try:
        models.enable_compilation_cache()
        models.enable_compilation_cache()
        assert not kept_values.keeping()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        models._why_not_kept.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "XDG_CACHE_HOME" in line


def test_folders_that_a_group_may_write_are_closed_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    found = user_cache.cache_folder("programs")
    found.mkdir(parents=True)
    for each in (found, found.parent):
        each.chmod(0o775)
    assert user_cache.why_not_own(found) is None
    assert [stat.S_IMODE(each.stat().st_mode) for each in (found, found.parent)] == [0o755] * 2


def test_a_caller_who_keeps_programs_elsewhere_keeps_none_here():
    assert not kept_values.keeping()  # as these tests do


def named(stack):
    asked = mlsd.prepare(stack, [[1, 2, 3]], max_new_tokens=4)
    sampling = mlsd.Sampling.create(1, stack.level.model.vocab_size)
    return fingerprints.fingerprint("begin", (stack, asked.tokens, asked.length, sampling), programs._depends(stack))


def test_stacks_are_told_apart_by_what_a_trace_sees(demo):
    plain, lookup = mlsd.stack(demo), mlsd.stack(demo, (mlsd.prompt_lookup(), 3))
    others = [lookup, mlsd.stack(demo, (mlsd.prompt_lookup(), 4)), mlsd.stack(demo, exact=False)]
    names = [named(stack) for stack in (plain, *others)]
    assert len(set(names)) == len(names)
    renamed = mlsd.Stack(plain.level, (mlsd.Card("other", 4096, 1024, None, ()),), exact=True)
    assert named(renamed) == names[0]
    weights = {name: leaf + 1 for name, leaf in demo.params.items()}
    assert named(mlsd.Stack(mlsd.Level(plain.level.model, weights), plain.cards, exact=True)) == names[0]


def test_what_a_caller_wrote_is_not_kept():
    for value in (object(), functools.partial(print), {"a": [object()]}, Counted):
        with pytest.raises(fingerprints.UnknownError):
            fingerprints.spelled(value)


def test_generation_loads_its_programs(demo, folder, monkeypatch):
    monkeypatch.setattr(programs, "compiler_options", lambda stack: quick_options())
    stack, options = mlsd.stack(demo), {"max_new_tokens": 5, "chat": False}
    expected = mlsd.generate(stack, "def f(", **options).tokens
    kinds = sorted(path.name.partition("-")[0] for path in folder.iterdir())
    assert kinds == ["advance", "begin", "feed"]
    programs._kept.cache_clear()
    for name in ("feed", "advance"):
        monkeypatch.setattr(programs.loop, name, lambda *_, **__: pytest.fail("traced"))
    assert mlsd.generate(stack, "def f(", **options).tokens == expected


PROGRAM = """
import jax, jax.numpy as jnp
from mlspecqd_jax.kept_programs import Kept
from mlspecqd_jax.loading import models
models.enable_compilation_cache()
print(Kept("f", lambda x: jnp.sort(x) + 1, lambda x: x, lambda x: ())(jnp.arange(4.0)).tolist())
"""


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for n in (2, 1):
        running = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(n)
        ]
        assert [(process.communicate(timeout=120), process.returncode) for process in running] == [
            (("[1.0, 2.0, 3.0, 4.0]\n", ""), 0)
        ] * n
    assert len(list((tmp_path / "mlspecqd-jax" / "programs").iterdir())) == 1
