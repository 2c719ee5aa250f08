"""Settings for every test: no network, a compilation cache of this run's own."""

import gc
import itertools
import os
import pathlib
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
# Else the GPU's compiler cannot be had where there is no GPU, once jax has looked for one.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# No code of ours counts on jax promoting types or ranks; before jax is imported, so that it holds in processes of their own too.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
if "MLSPECQD_TESTS_CACHE" not in os.environ:  # the workers of a run share one, so that what one compiles the others find
    _cache = tempfile.TemporaryDirectory(prefix="mlspecqd-tests-")
    os.environ["MLSPECQD_TESTS_CACHE"] = _cache.name
os.environ["XDG_CACHE_HOME"] = os.environ["MLSPECQD_TESTS_CACHE"]
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["MLSPECQD_TESTS_CACHE"] + "/xla"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


def pytest_collection_finish():
    """Look for garbage less often: jax keeps millions of objects, which a whole collection goes through."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


MAPS = pathlib.Path("/proc/self/maps")  # the memory regions of this process, one a line; Linux has them
MOST_MAPS = 30_000  # each compiled program has several, a long test two thousand, and Linux allows a process 65,530
_ended = itertools.count(1)


def pytest_runtest_teardown():
    """Throw compiled programs away once there are many, else XLA crashes in a worker that runs many tests."""
    if next(_ended) % 8 or not MAPS.exists():
        return
    with MAPS.open("rb") as file:
        regions = sum(1 for _ in file)
    if regions > MOST_MAPS:
        import jax

        from mlspecqd_jax import programs

        jax.clear_caches()
        programs._kept.cache_clear()
        gc.collect()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Folder of larger data for measurements, beside the repository; what needs it is skipped where it is absent."""
    folder = pathlib.Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the data folder beside the repository")
    return folder


@pytest.fixture(scope="session")
def demo():
    """The demo checkpoint in float32, in which comparisons are exact."""
    import mlspecqd_jax as mlsd

    return mlsd.load("demo", dtype="float32")


@pytest.fixture
def compiled_quickly():
    """Compile with less optimization, for tests that show nothing that depends on it."""
    import jax
    from compiling import quick_options

    import mlspecqd_jax as mlsd
    from mlspecqd_jax import programs

    with pytest.MonkeyPatch.context() as patch:
        for module in (mlsd, programs):  # generation's own programs, which are kept by their options
            patch.setattr(module, "compiler_options", lambda stack: quick_options())
        jax.config.update("jax_disable_most_optimizations", True)  # all others
        yield
        jax.config.update("jax_disable_most_optimizations", False)
