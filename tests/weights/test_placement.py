"""Weights in huge pages: the same values, used where they were put, given back when they are gone."""

import gc
import mmap
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlspecqd_jax.weights.placement import HUGE_PAGE, place

MAPPED = pathlib.Path("/proc/self/smaps")
linux = pytest.mark.skipif(not (MAPPED.exists() and hasattr(mmap, "MADV_HUGEPAGE")), reason="Linux only")


def asked_for(pointer: int) -> bool:
    """Return whether huge pages were asked for where a pointer leads."""
    here = False
    for line in MAPPED.read_text().splitlines():
        first = line.split()[0]
        if "-" in first and ":" not in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            here = begin <= pointer < end
        elif here and first == "VmFlags:":
            return "hg" in line.split()
    return False


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.uint8])
@pytest.mark.parametrize("size", [0, 1000, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 4096])
def test_values_are_kept(dtype, size):
    k = 8
    given = np.random.RandomState(size % 1000).randint(0, 100, (size // k // jnp.dtype(dtype).itemsize, k)).astype(dtype)
    placed = place(given)
    assert placed.dtype == given.dtype
    np.testing.assert_array_equal(np.asarray(placed), given)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda x: x + x)(placed)), given + given)


@linux
def test_huge_pages_are_asked_for():
    given = np.ones(2 * HUGE_PAGE, np.uint8)
    placed = place(given)
    assert placed.unsafe_buffer_pointer() != given.ctypes.data
    assert asked_for(placed.unsafe_buffer_pointer() + HUGE_PAGE)


@linux
def test_what_is_gone_is_given_back():
    placed = place(np.ones(2 * HUGE_PAGE, np.uint8))
    inside = placed.unsafe_buffer_pointer() + HUGE_PAGE
    assert asked_for(inside)
    del placed
    gc.collect()
    assert not asked_for(inside)


def test_a_sharding_is_kept():
    mesh = jax.make_mesh((1,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", None))
    placed = place(np.ones((HUGE_PAGE // 4, 4), np.float32), sharding)
    assert placed.sharding == sharding
