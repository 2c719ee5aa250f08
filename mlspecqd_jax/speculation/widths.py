"""Running what is needed now, and of several windows the narrowest, each a program of its own, by how many rows are in use."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def run_if(needed: jax.Array, run: Callable[[Any], Any], carry: Any) -> Any:
    """Return run(carry) if that is needed, bool [], or else the carry, whose arrays are updated in place.

    It is a loop of one trip or none: jaxlib copies every cache at a `lax.switch` or `lax.cond` until 0.11.1 (openxla/xla#46314),
    and none at a loop.
    """

    def body(carry):
        return jnp.bool_(False), run(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], body, (needed, carry))[1]


def run_narrowest(
    widths: tuple[int, ...], rows: jax.Array, run: Callable[[int, Any], tuple[Any, Any]], cache: Any, nothing: Any
) -> tuple[Any, Any]:
    """Return run(width, cache), a cache and a result, for the least width that holds `rows`.

    Args:
      widths: static, ascending.
      rows: int32 [], at most the last of them.
      run: of a static width and the cache, which it gives back updated.
      cache: to be updated in place.
      nothing: of the shapes of a result, which are those of all widths.
    """
    if len(widths) == 1:
        return run(widths[0], cache)
    narrower, result = jnp.int32(-1), nothing
    for width in widths:
        fits = (rows > narrower) & (rows <= width)
        cache, result = run_if(fits, lambda carry, width=width: run(width, carry[0]), (cache, result))
        narrower = jnp.int32(width)
    return cache, result
