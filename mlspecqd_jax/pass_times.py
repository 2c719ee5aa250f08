"""What passes take, by level and by rows in use: guessed from bytes, for stacks of which nothing was measured.

Reading weights is what takes the time, so that a pass of a draft takes about its bytes over the target's; on CPU each row more
takes a part of it too, and chips run sixteen rows in the time of one. Of a mixture more rows hit more experts, so that a wide
window reads several times the bytes of a narrow one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlspecqd_jax.speculation.buffers import SLACK

OVERHEAD = 0.06  # of a pass of the target that each pass takes whatever its bytes
SLOPE = {"cpu": 0.06, "cpu-xla": 0.3}  # of a pass, for each row more
ASKING = 0.01  # of a pass, what a round takes beyond a plain one if a draft is asked for and there is none
CHIP_ROWS, CHIP_SLOPE = 16, 0.03  # rows that take the time of one, and each more


ROWS = np.arange(SLACK + 1)


def guessed(nbytes: Sequence[Any], device: str) -> np.ndarray:
    """Return the times of passes in those of the target over one row, f64 [L, SLACK + 1], given what they read of the weights.

    Args:
      nbytes: of each level, the target first: the bytes that a pass over ROWS reads, [SLACK + 1], or one number for all.
      device: cpu (with the C++ products), cpu-xla, gpu or tpu.
    """
    more = np.maximum(ROWS - 1, 0) * SLOPE[device] if device in SLOPE else np.maximum(ROWS - CHIP_ROWS, 0) * CHIP_SLOPE
    read = np.stack([np.broadcast_to(each, ROWS.shape) for each in nbytes]).astype(np.float64)
    times = OVERHEAD + (1 - OVERHEAD) * read / read[0, 1]
    return (times + times[:, 1:2] * more) * (ROWS > 0)
