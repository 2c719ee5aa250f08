"""Windows of a batch of which some rows are in use, and that those are computed alike."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np


def numbers_in_use(batch: int, window: int) -> Iterator[np.ndarray]:
    """Yield int32 [B]: every number of rows in every place, beside other ones; at last some below none and beyond the window."""
    for used in range(window + 1):
        yield ((used + 2 * np.arange(batch)) % (window + 1)).astype(np.int32)
    yield np.where(np.arange(batch) % 2 == 0, window + 3, -2).astype(np.int32)


def in_use(used: np.ndarray, window: int) -> np.ndarray:
    """Return bool [B, W]."""
    return np.arange(window)[None] < used[:, None]


def assert_rows_in_use(run: Callable, x: np.ndarray, whole: np.ndarray) -> None:
    """Assert that run(x [M, K], used) has the bits of `whole` [M, ...] in the rows in use, whatever the others of x are."""
    for batch, window in ((1, 9), (3, 6)):
        for used in numbers_in_use(batch, window):
            rows = in_use(used, window).ravel()
            given = np.where(rows[:, None], x[: len(rows)], x.dtype.type(np.nan))
            found = np.asarray(run(given, jnp.asarray(used)))
            np.testing.assert_array_equal(found[rows], whole[: len(rows)][rows], err_msg=f"{used} of {window} rows")
