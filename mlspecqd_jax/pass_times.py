"""What passes take, by level and by rows in use: guessed from bytes, for stacks of which nothing was measured.

Reading weights is what takes the time, so that a pass of a draft takes about its bytes over the target's; on CPU each row more
takes a part of it too, and chips run sixteen rows in the time of one.
"""

import numpy as np

from mlspecqd_jax.speculation.buffers import SLACK

OVERHEAD = 0.06  # of a pass of the target that each pass takes whatever its bytes
SLOPE = {"cpu": 0.06, "cpu-xla": 0.3}  # of a pass, for each row more
ASKING = 0.01  # of a pass, what a round takes beyond a plain one if a draft is asked for and there is none
CHIP_ROWS, CHIP_SLOPE = 16, 0.03  # rows that take the time of one, and each more


def guessed(nbytes: list[int], device: str) -> np.ndarray:
    """Return the times of passes in those of the target over one row, f64 [L, SLACK + 1], given the bytes of each level's weights.

    Args:
      nbytes: of the target first.
      device: cpu (with the C++ products), cpu-xla, gpu or tpu.
    """
    rows = np.arange(SLACK + 1)
    more = np.maximum(rows - 1, 0) * SLOPE[device] if device in SLOPE else np.maximum(rows - CHIP_ROWS, 0) * CHIP_SLOPE
    first = np.array([1.0] + [OVERHEAD + (1 - OVERHEAD) * size / nbytes[0] for size in nbytes[1:]])
    return first[:, None] * (1 + more) * (rows > 0)
