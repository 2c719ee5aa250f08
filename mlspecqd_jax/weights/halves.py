"""`halves`: scales and minima of other people's weights as the float16 in which they are stored here."""

import numpy as np


def halves(scales: np.ndarray, minima: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return "scales", float16 [N, G], "minima" likewise where there are any, and "tensor_scale", f32 [1], where it is needed.

    It is needed where float16 does not hold the scales or the range of the minima: a power of two by which all were divided, so
    that the largest comes to lie in [2^14, 2^15). What still rounds does so to nearest. What is not finite stays so.
    """
    given = {"scales": scales} | ({} if minima is None else {"minima": minima})
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        largest = max(float(np.abs(array).max()) for array in given.values())
        exact = largest < np.finfo(np.float16).max and bool((scales.astype(np.float16) == scales).all())
        if exact or not np.isfinite(largest):
            return {role: array.astype(np.float16) for role, array in given.items()}
        factor = np.ldexp(np.ones(1, np.float32), np.frexp(largest)[1] - 15)
        return {role: (array / factor).astype(np.float16) for role, array in given.items()} | {"tensor_scale": factor}
