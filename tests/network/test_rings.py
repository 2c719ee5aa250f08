"""Rings: positions written in windows of any width, also fed again, are read as from a buffer that holds all of them."""

import numpy as np
import pytest
from compiling import quick_jit

from mlspecqd_jax.network import rings

B, S, K = 3, 60, 2
read, write = quick_jit(rings.read, static_argnums=2), quick_jit(rings.write)


@pytest.mark.parametrize(("reach", "behind", "width"), [(4, 2, 5), (0, 3, 1), (7, 0, 2), (1, 2, 9)])
def test_a_ring_is_the_end_of_a_buffer(reach, behind, width):
    random = np.random.default_rng(0)
    size = reach + behind
    ring, whole, end = np.zeros((B, size, K), np.float32), np.zeros((B, S, K), np.float32), np.zeros(B, np.int64)
    while end.max() < S - width:
        start = np.maximum(end - random.integers(0, reach + 1, B), 0)
        used = random.integers(0, width + 1, B)
        first = start - behind
        before = np.asarray(read(ring, first.astype(np.int32), behind))
        for r in range(B):
            expected = [whole[r, p] if p >= 0 else np.zeros(K) for p in range(first[r], start[r])]
            np.testing.assert_array_equal(before[r], np.reshape(expected, (behind, K)))
        values = random.normal(size=(B, width, K)).astype(np.float32)
        padding = np.arange(width)[None] >= used[:, None]
        ring = write(ring, np.where(padding[..., None], np.nan, values), start.astype(np.int32), used.astype(np.int32))
        for r in range(B):
            whole[r, start[r] : start[r] + used[r]] = values[r, : used[r]]
        end = np.maximum(end, start + used)
    assert np.all(np.isfinite(ring))


def test_padding_beyond_a_text_changes_nothing():
    """A prompt's last pieces may lie behind its end altogether."""
    ring = np.arange(B * 4 * K, dtype=np.float32).reshape(B, 4, K)
    found = write(ring, np.full((B, 6, K), np.nan, np.float32), np.array([3, 50, 0], np.int32), np.zeros(B, np.int32))
    np.testing.assert_array_equal(found, ring)
