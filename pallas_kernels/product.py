"""`Product`: the type of a record that says how activations [M, K] are multiplied with a weight [N, K] in some format.

Each product's record lies in the file of its kernel; `products` lists them. A chip is a string: of `products.chip_of`. Arrays come
by role: "codes" and "scales" are those of the weight as it is stored, and a product that wants others makes them of these once.
Notation: M rows of activations, N outputs, K contracted.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

ONE_WIDTH = 16  # rows, at which a row is computed alike because all windows have it; of a multiple of it nothing is known
PLAIN = "plain"  # what stands for a format where a weight is not quantized
MX = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2")


class Product(NamedTuple):
    """One way to multiply with a weight, and everything that is asked about it."""

    name: str
    formats: tuple[str, ...] | None  # that it reads, or PLAIN; None: every one that is not plain
    why_not: Callable[[str, str, int, int, int, int], str | None]
    """(chip, dtype, n, k, along_n, along_k) to why it cannot be had, as the end of a sentence, or None if it can."""
    arrange: Callable[..., dict[str, jax.Array]]
    """(**stored, format=None, along_n=1, along_k=1) to its own arrays.

    format is how the weight is stored; so many equal parts of N and of K will lie on different devices.
    With `by_experts` it takes experts=1 too, of how many these are the weights, one's rows after another's.
    """
    axes: Mapping[str, tuple[str | None, ...]]
    """Which dimensions of the weight, "n" or "k", those of its arrays are."""
    run: Callable[..., jax.Array]
    """(x [M, K], arrays, *, n, chip, format, interpret, used=None) to f32 [M, N].

    n: the outputs of these arrays, without what they were filled up with; format: how the weight was stored, as
    `weights.formats.Format` says it; interpret: run a Pallas kernel by an interpreter; used: int32 [B], how many rows are wanted of
    each of B windows of M / B rows, or None for all; the others need not be computed.
    """
    row_multiple: Callable[[str, str], int | None]
    """(chip, dtype) to the number of rows to which windows are padded so that a row is computed alike for all of them.

    1: every row by itself. 2: at all even numbers of rows. 16: one padded width, beyond which nothing is known. None: no such
    number is known.
    """
    by_experts: Callable[..., jax.Array] | None = None
    """(x [T, C or 1, K], experts int32 [T, C], arrays, *, e, n, chip, format, interpret) to f32 [T, C, N], if it can.

    Each row is multiplied by the weights of its C experts of e, each of n outputs; -1 is none, whose result is not defined. Of the
    others' weights not one is read.
    """


def reads(product: Product, format: str) -> bool:
    """Return whether a product reads weights in a format, or those that are not quantized, which is PLAIN."""
    return format in product.formats if product.formats is not None else format != PLAIN


def anywhere(chip: str, dtype: str, n: int, k: int, along_n: int, along_k: int) -> str | None:
    """`why_not` of a product that can always be had."""
    return None


def as_stored(
    *, format: Any = None, experts: int = 1, along_n: int = 1, along_k: int = 1, **stored: jax.Array
) -> dict[str, jax.Array]:
    """`arrange` of a product that reads what is stored."""
    return stored


# Of every array that a stored weight may have.
STORED_AXES: Mapping[str, tuple[str | None, ...]] = {"codes": ("n", "k"), "scales": ("n", "k"), "minima": ("n", "k")}
