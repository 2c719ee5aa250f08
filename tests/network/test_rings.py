"""Rings: positions written in windows of any width, also fed again, are read as from a buffer that holds all of them."""

import numpy as np
import pytest
from compiling import quick_jit

from mlspecqd_jax.network import rings

B, S, K = 3, 60, 2
seen, kept = quick_jit(rings.seen), quick_jit(rings.kept, static_argnums=1)


@pytest.mark.parametrize(("reach", "behind", "width"), [(4, 2, 5), (0, 3, 1), (7, 0, 2), (1, 2, 9)])
def test_a_ring_is_the_end_of_a_buffer(reach, behind, width):
    """Windows go back by up to `reach` from the furthest position, and read `behind` positions before their own."""
    random = np.random.default_rng(0)
    size = reach + behind
    ring, whole, end = np.zeros((B, size, K), np.float32), np.zeros((B, S, K), np.float32), np.zeros(B, np.int64)
    while end.max() < S - width:
        start = np.maximum(end - random.integers(0, reach + 1, B), 0)
        used = random.integers(0, width + 1, B)
        values = random.normal(size=(B, width, K)).astype(np.float32)
        padding = np.arange(width)[None] >= used[:, None]
        found = np.asarray(seen(ring, np.where(padding[..., None], np.nan, values), start.astype(np.int32)))
        for r in range(B):
            first = max(start[r] - behind, 0)
            np.testing.assert_array_equal(found[r, size - (start[r] - first) : size], whole[r, first : start[r]])
            whole[r, start[r] : start[r] + used[r]] = values[r, : used[r]]
            np.testing.assert_array_equal(found[r, size : size + used[r]], values[r, : used[r]])
        ring = kept(found, size, start.astype(np.int32), used.astype(np.int32))
        end = np.maximum(end, start + used)
    assert np.all(np.isfinite(ring))


def test_padding_beyond_a_text_changes_nothing():
    """A prompt's last pieces may lie behind its end altogether."""
    ring, start = 1 + np.arange(B * 4 * K, dtype=np.float32).reshape(B, 4, K), np.array([4, 50, 7], np.int32)
    found = kept(seen(ring, np.full((B, 6, K), np.nan, np.float32), start), 4, start, np.zeros(B, np.int32))
    np.testing.assert_array_equal(found, ring)
