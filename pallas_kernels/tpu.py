"""MXFP4 products on TPU: nibbles become float8, four to a 32-bit register, and the matrix unit multiplies them with bfloat16.

Three words for sizes along K: an *MX block* is the 32 elements that share a scale, a *kernel tile* is what one step of the grid
loads, and the matrix unit contracts 128 elements at a time. Notation: M rows of activations, N outputs, K contracted, T tiles.

An E2M1 code s|ee|m in the bits s000eem0 of an E5M2 number has its own value times 2^-14 (E2M1's 0.5 is then subnormal), so a
decoded weight costs less than one integer operation, and x carries the missing 2^14.

Up to 16 rows, scales are applied to outputs: x is spread over four rows for each of its own, every one with the elements of one
MX block in four and zeros elsewhere, so that a pass of the matrix unit over 128 elements leaves four partial sums, which are
multiplied by their blocks' scales. With more rows it is cheaper to scale the weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import ROWS, tpu_block_n, tpu_tile
from pallas_kernels.pallas import pl, pltpu
from pallas_kernels.product import Product

PALLAS_TPUS = ("TPU v5 lite", "TPU v5", "TPU v5p", "TPU v5e", "TPU v6 lite", "TPU v6e", "TPU7x")
MOST_K = 2**17  # the activations of all of K are kept on the chip
CONTRACTED = 128  # by the matrix unit at once
LANES = 128  # outputs, of which arrays hold whole ones
GROUPS = CONTRACTED // 32  # MX blocks among them


def arrange(codes: jax.Array, scales: jax.Array, along_n: int = 1, along_k: int = 1, format: Any = None) -> dict[str, jax.Array]:
    """Return an MXFP4 weight as the kernels read it: K before N, in tiles, two codes a byte.

    A byte of row r of a tile holds code r of its first half in bits 6 to 4 (magnitude) and 0 (sign), and code r of its second half
    in bits 3 to 1 and 7. Zeros fill the last tile, and N up to whole 128s: XLA would store other sizes with K last, and copy all of
    it for the kernels.

    Args:
      codes: uint8 [N, K/2], element 2i in the low half of byte i.
      scales: uint8 [N, K/32].
      along_n: number of equal parts of N that will lie on different devices, each filled up by itself.
      along_k: likewise of K, each in tiles of its own.

    Returns:
      codes: uint8 [T, tile/2, N]; scales: uint8 [T, tile/32, N].
    """
    n, blocks = scales.shape
    k = 32 * blocks // along_k
    tile = tpu_tile(k)

    def filled(array, wide):
        array = array.reshape(along_n, n // along_n, along_k, -1)
        array = jnp.pad(array, ((0, 0), (0, -array.shape[1] % LANES), (0, 0), (0, -array.shape[3] % wide)))
        return array.reshape(along_n * array.shape[1], -1, wide)

    codes = filled(jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(n, -1), tile)
    first, second = codes[:, :, : tile // 2], codes[:, :, tile // 2 :]
    joined = (first & 7) << 4 | first >> 3 | (second & 7) << 1 | second >> 3 << 7
    scales = filled(scales, tile // 32)
    return {"codes": jnp.transpose(joined, (1, 2, 0)), "scales": jnp.transpose(scales, (1, 2, 0))}


def mxfp4_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    n: int,
    subnormals: bool = True,
    interpret: "bool | pltpu.InterpretParams" = False,
) -> jax.Array:
    """x @ w.T for a weight arranged by `arrange`, with f32 accumulation and an f32 result.

    M is padded to 8, to 16, or to a multiple of 128, and within each of the three a row's result does not depend on M. Magnitudes
    of x are taken up to 2^113; with more than 16 rows, weights below 2^-112 count as zero.

    Args:
      x: bfloat16 [M, K].
      codes: uint8 [T, tile/2, N].
      scales: uint8 [T, tile/32, N].
      n: N before it was filled up.
      subnormals: whether the matrix unit honours subnormal E5M2 numbers; without them decoding takes more operations.
      interpret: run by an interpreter, on any platform.

    Returns:
      f32 [M, N].
    """
    m, k = x.shape
    tiles, half, filled = codes.shape
    if tiles * 2 * half != k + -k % (2 * half) or scales.shape != (tiles, half // 16, filled) or filled != n + -n % LANES:
        raise ValueError(
            f"x {list(x.shape)} does not belong to codes {list(codes.shape)} and scales {list(scales.shape)}; "
            f"give x [M, K], codes [T, tile/2, N] and scales [T, tile/32, N], N being {n} filled up to whole {LANES}s and K "
            "filling all tiles but the last"
        )
    rows = next((rows for rows in ROWS if m <= rows), m + -m % 128)
    x = jnp.pad(x, ((0, rows - m), (0, tiles * 2 * half - k)))
    if subnormals:
        x = x * 2.0**14
    run = _scale_on_outputs if rows in ROWS else _scale_on_weights
    return run(x, codes, scales, subnormals, interpret)[:m, :n]


def honours_subnormals(run) -> bool:
    """Return whether `run(x, codes, scales)`, a product of 16 outputs on the device, gets all 16 codes right with E5M2 subnormals.

    On a matrix unit that flushes them, 0.5 and -0.5 would be read as zero.
    """
    every = jnp.arange(16, dtype=jnp.uint8)[:, None] * jnp.full((1, 16), 17, jnp.uint8)  # row c is code c, 32 times
    scales = jnp.full((16, 1), 127, jnp.uint8)
    x = jnp.zeros((1, 32), jnp.bfloat16).at[0, 0].set(1)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = jnp.array(magnitudes + [-value for value in magnitudes])
    return bool(jnp.array_equal(run(x, **arrange(every, scales))[0], expected))


@functools.partial(jax.jit, static_argnames=("subnormals", "interpret"))
def _scale_on_outputs(x, codes, scales, subnormals, interpret):
    rows, k = x.shape
    tiles, half, n = codes.shape
    x = jnp.swapaxes(x.reshape(rows, tiles, 1, 2 * half), 0, 1)  # [T, M, 1, tile]
    of_group = jnp.arange(2 * half)[None, None, :] // 32 % GROUPS == jnp.arange(GROUPS)[:, None, None]  # [4, 1, tile]
    spread = jnp.where(of_group, jnp.swapaxes(x, 1, 2), 0).reshape(tiles, GROUPS * rows, 2 * half)
    block = tpu_block_n(n, tiles)
    return pl.pallas_call(
        functools.partial(_decode_kernel, subnormals=subnormals),
        grid=(pl.cdiv(n, block), tiles),
        in_specs=[
            pl.BlockSpec(spread.shape, lambda j, t: (0, 0, 0)),  # all of it, once: not again for every block of outputs
            pl.BlockSpec((1, half, block), lambda j, t: (t, 0, j)),
            pl.BlockSpec((1, half // 16, block), lambda j, t: (t, 0, j)),
        ],
        out_specs=pl.BlockSpec((rows, block), lambda j, t: (0, j)),
        out_shape=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(rows, k, n, spread, codes, scales),
        interpret=interpret,
        name="mxfp4_decode",
    )(spread, codes, scales)


def _decode_kernel(x_ref, codes_ref, scales_ref, out_ref, *, subnormals):
    t = pl.program_id(1)

    @pl.when(t == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    rows, half = out_ref.shape[0], codes_ref.shape[1]
    scales = _scales(scales_ref)
    total = jnp.zeros(out_ref.shape, jnp.float32)
    for i, weight in enumerate(float8(codes_ref[0], subnormals)):
        for j in range(0, half, CONTRACTED):
            at = i * half + j
            partial = jnp.dot(x_ref[t, :, at : at + CONTRACTED], weight[j : j + CONTRACTED], preferred_element_type=jnp.float32)
            for g in range(GROUPS):
                total += partial[g * rows : (g + 1) * rows] * scales[at // 32 + g][None]
    out_ref[...] += total


@functools.partial(jax.jit, static_argnames=("subnormals", "interpret"))
def _scale_on_weights(x, codes, scales, subnormals, interpret):
    rows, k = x.shape
    tiles, half, n = codes.shape
    block = min(512, tpu_block_n(n, tiles))
    return pl.pallas_call(
        functools.partial(_wide_kernel, subnormals=subnormals),
        grid=(rows // 128, pl.cdiv(n, block), tiles),
        in_specs=[
            pl.BlockSpec((128, 2 * half), lambda i, j, t: (i, t)),
            pl.BlockSpec((1, half, block), lambda i, j, t: (t, 0, j)),
            pl.BlockSpec((1, half // 16, block), lambda i, j, t: (t, 0, j)),
        ],
        out_specs=pl.BlockSpec((128, block), lambda i, j, t: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(rows, k, n, x, codes, scales),
        interpret=interpret,
        name="mxfp4_wide",
    )(x, codes, scales)


def _wide_kernel(x_ref, codes_ref, scales_ref, out_ref, *, subnormals):
    @pl.when(pl.program_id(2) == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    half, n = codes_ref.shape[1:]
    scales = _scales(scales_ref)
    total = jnp.zeros(out_ref.shape, jnp.float32)
    for i, weight in enumerate(float8(codes_ref[0], subnormals)):
        for j in range(0, half, CONTRACTED):
            at = i * half + j
            scale = scales[at // 32 : at // 32 + GROUPS, None]  # [4, 1, N]
            piece = weight[j : j + CONTRACTED].astype(jnp.float32).reshape(GROUPS, 32, n) * scale
            piece = piece.reshape(CONTRACTED, n).astype(jnp.bfloat16)
            total += jnp.dot(x_ref[:, at : at + CONTRACTED], piece, preferred_element_type=jnp.float32)
    out_ref[...] += total


def float8(codes: jax.Array, subnormals: bool) -> list[jax.Array]:
    """Return the two halves of a tile, uint8 [tile/2, N], as E5M2 [tile/2, N], times 2^-14 if subnormals may be used."""
    words = pltpu.bitcast(codes, jnp.int32)
    first = words >> 3 & each_byte(0x0E) | words << 7 & each_byte(0x80)
    second = words & each_byte(0x8E)
    return [pltpu.bitcast(half if subnormals else _normal(half), jnp.float8_e5m2) for half in (first, second)]


def _normal(words):
    """Turn bytes s000eem0 into E5M2 of the value itself, never subnormal: 0x38 + 4 ee + 2 m, and where ee is 0, 0x38 m."""
    magnitude = words & each_byte(0x0E)
    normal = (magnitude >> 2 | magnitude >> 3) & each_byte(0x01)  # ee > 0
    half = magnitude >> 1 & ~normal & each_byte(0x01)  # 0.5
    return magnitude + 0x38 * normal + 0x36 * half | words & each_byte(0x80)


def each_byte(byte: int) -> int:
    """Return a word of four such bytes, as an int32."""
    word = 0x01010101 * byte
    return word if byte < 0x80 else word - 2**32


def _scales(scales_ref):
    # A float32 whose exponent is the byte; the byte 0 is the number 0.
    return jax.lax.bitcast_convert_type(scales_ref[0].astype(jnp.int32) << 23, jnp.float32)


def _cost(rows, k, n, *arrays):
    moved = sum(array.size * array.dtype.itemsize for array in arrays) + 4 * rows * n
    return pl.CostEstimate(flops=2 * rows * k * n, bytes_accessed=moved, transcendentals=0)


def left_in_hbm(array: jax.Array) -> jax.Array:
    """Return an array of all experts, of which a kernel reads a part: XLA might else fetch it whole before the kernel runs."""
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


def why_not(chip: str, dtype: str, n: int, k: int, along_n: int, along_k: int) -> str | None:
    """Return why these kernels cannot be had, as the end of a sentence."""
    if chip not in PALLAS_TPUS:
        return "needs a TPU v5e, v5p, v6e or 7x; on another TPU use 'grouped'"
    if k // along_k > MOST_K:
        return f"takes K up to {MOST_K} on a device; use 'grouped'"
    return None if dtype == "bfloat16" else "takes bfloat16 alone; use 'grouped'"


def _run(x, arrays, *, n, chip, format, interpret, used=None):
    return mxfp4_matmul(x, **arrays, n=n, interpret=interpret)


def _run_without_subnormals(x, arrays, *, n, chip, format, interpret, used=None):
    return mxfp4_matmul(x, **arrays, n=n, subnormals=False, interpret=interpret)


def row_multiple(chip: str, dtype: str) -> int:
    """The rows that one kernel takes at once, and the most for which it does not scale the weights."""
    return ROWS[-1]


DECODE = Product("tpu", ("mxfp4",), why_not, arrange, {"codes": ("k", None, "n"), "scales": ("k", None, "n")}, _run, row_multiple)
DECODE_WITHOUT_SUBNORMALS = DECODE._replace(name="tpu without subnormals", run=_run_without_subnormals)
