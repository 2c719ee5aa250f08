"""Where the weights of a model lie: on a device, over a mesh, or on a CPU in huge pages.

Every pass over a model reads all of its weights. Through pages of 4 KB a processor spends part of that time on finding the next
page, and it fetches ahead to the end of one only.
"""

import mmap

import jax
import numpy as np
from jax.sharding import Sharding

HUGE_PAGE = 2**21  # bytes


def place(array: np.ndarray | jax.Array, sharding: Sharding | None = None) -> jax.Array:
    """Put an array where a sharding says, or on the default device; on a CPU, in huge pages if it fills one.

    Linux gives huge pages to memory for which they are asked before it is written, so this copies. Other systems have no such
    request, and there it is `jax.device_put`.
    """
    if sharding is None and jax.default_backend() == "cpu" and hasattr(mmap, "MADV_HUGEPAGE") and array.nbytes >= HUGE_PAGE:
        array = _in_huge_pages(np.asarray(array))  # on a page's edge, hence used by device_put as it is
    return jax.device_put(array, sharding)


def _in_huge_pages(array: np.ndarray) -> np.ndarray:
    memory = mmap.mmap(-1, array.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy
