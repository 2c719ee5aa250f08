"""MXFP4 products on NVIDIA GPUs from sm_80 on: nibbles become bfloat16 pairs in registers and go to the tensor cores.

Written in Pallas for its Triton compiler. Notation: M rows of activations, N outputs, K contracted, C chunks of 128 along K. An
*MX block* is the 32 elements that share a scale, a *kernel tile* is what one program of the grid loads at a time.

An E2M1 code s|ee|m whose bits lie at s000000ee m000000 of a bfloat16 is its own value times 2^-126 (E2M1's 0.5 is then subnormal,
which products of bfloat16 pairs honour), so that masks, shifts and one product with the block's scale times 2^126 decode it. Scales
of more than 2 would leave bfloat16 by that: an output in which one is has all its scales divided by a power of two, and is
multiplied by it in the end.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import gpu_blocks
from pallas_kernels.pallas import pl, plgpu
from pallas_kernels.product import ONE_WIDTH, Product

CHUNK = 128  # elements of a row in 16 words, one 16-byte load for each of four threads
OUTPUTS = 64  # what N is a multiple of: every block size of `gpu_blocks` divides it
STEPS = CHUNK // 16  # products of 16 elements each, the tensor cores' own size
BIAS = 126  # of the power of two that decoding lacks
GREATEST = 254 - BIAS  # the scale byte, 2, whose product with 2^BIAS is the greatest power of two in bfloat16
# Where the four codes of a half word lie: the shifts to the left that bring a magnitude to bits 6 to 8, and its sign to bit 15. Of
# all ways to place them this needs the fewest instructions, 11 for four pairs: two codes lie with their sign as in a bfloat16.
SHIFTS = ((0, 0), (3, 3), (6, 1), (-3, 2))


def arrange(codes: jax.Array, scales: jax.Array, along_n: int = 1, along_k: int = 1, format: Any = None) -> dict[str, jax.Array]:
    """Return an MXFP4 weight as the kernel reads it: chunks of 128 along K, one row after the other within a chunk.

    Words 2i and 2i + 1 of a row's 16 in a chunk hold elements 16 s + 2i (lower halves) and 16 s + 2i + 1 (upper halves): the first
    word the steps s = 0..3, the second the steps 4..7, step s where `SHIFTS[s % 4]` says. The four scales of a chunk are the bytes
    of one word, the first lowest: the exponent bits of the bfloat16 with which a decoded code is multiplied, 0 for the number 0. N
    is filled up to whole 64s and K to whole 128s with zeros.

    Args:
      codes: uint8 [N, K/2], element 2i in the low half of byte i.
      scales: uint8 [N, K/32].
      along_n: number of equal parts of N that will lie on different devices, each filled up by itself.
      along_k: likewise of K.

    Returns:
      words: int32 [C, N, 16]; scales: int32 [C, N]; power: f32 [N], what each output is multiplied by.
    """
    scales = scales.astype(jnp.int32)
    too_large = jnp.maximum(jnp.max(scales, axis=1, initial=0) - GREATEST, 0)  # [N]
    scales = jnp.where(scales > 0, jnp.maximum(scales + BIAS - too_large[:, None], 0), 0)
    power = jax.lax.bitcast_convert_type(too_large + 127 << 23, jnp.float32)
    codes, scales = (_filled(array, along_n, along_k, per_chunk) for array, per_chunk in ((codes, 64), (scales, 4)))
    n = codes.shape[0]
    codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(n, -1, 2, 4, 8, 2).astype(jnp.uint32)
    placed = [(codes[:, :, :, s] & 7) << 6 - low | codes[:, :, :, s] >> 3 << 15 - sign for s, (low, sign) in enumerate(SHIFTS)]
    halves = functools.reduce(jnp.bitwise_or, placed)  # [N, C, word, pair, half]
    words = jnp.transpose(halves[..., 0] | halves[..., 1] << 16, (1, 0, 3, 2)).reshape(-1, n, 16)
    scales = scales.reshape(n, -1, 4)
    shifts = 8 * jnp.arange(4, dtype=jnp.uint32)[None, None, :]
    scales = jnp.sum(scales.astype(jnp.uint32) << shifts, axis=2, dtype=jnp.uint32).T
    words, scales = (jax.lax.bitcast_convert_type(array, jnp.int32) for array in (words, scales))
    return {"words": words, "scales": scales, "power": power}


@functools.partial(jax.jit, static_argnames=("n", "chip", "interpret"))
def mxfp4_matmul(
    x: jax.Array, words: jax.Array, scales: jax.Array, power: jax.Array, *, n: int, chip: str = "", interpret: bool = False
) -> jax.Array:
    """x @ w.T for a weight arranged by `arrange`, with f32 accumulation and an f32 result.

    M is padded to 8, to 16 or to a multiple of 64, and within each of them a row's result does not depend on M.

    Args:
      x: bfloat16 or float16 [M, K].
      words: int32 [C, N, 16].
      scales: int32 [C, N].
      power: f32 [N], for the outputs before N was filled up.
      n: their number.
      chip: the compute capability, such as "sm_90", by which block sizes are chosen.
      interpret: run by Pallas's interpreter, on any platform.

    Returns:
      f32 [M, N].
    """
    chunks, filled = scales.shape
    fits = chunks == -(-x.shape[1] // CHUNK) and words.shape == (chunks, filled, 16)
    if not fits or filled != n + -n % OUTPUTS or power.shape != (n,):
        raise ValueError(
            f"x {list(x.shape)} does not belong to words {list(words.shape)}, scales {list(scales.shape)} and power "
            f"{list(power.shape)} of {n} outputs; give words [C, N, 16] and scales [C, N], N filled up to whole {OUTPUTS}s and K "
            f"to C chunks of {CHUNK}"
        )
    if x.dtype == jnp.float16:
        high = x.astype(jnp.bfloat16)
        low = jnp.where(jnp.isfinite(x), x.astype(jnp.float32) - high.astype(jnp.float32), 0).astype(jnp.bfloat16)
        high, low = jnp.split(_sums(jnp.concatenate([high, low]), words, scales, chip, interpret), 2)
        sums = high + low  # of two exact parts of x
    else:
        sums = _sums(x, words, scales, chip, interpret)
    return sums[:, :n] * power[None, :]


def _sums(x, words, scales, chip, interpret):
    """The product in bfloat16, without the outputs' powers of two: f32 [M, N]."""
    m, k = x.shape
    chunks, filled = scales.shape
    rows = 8 if m <= 8 else 16 if m <= 16 else 64
    block_n, splits, warps, stages = gpu_blocks(chip, filled, chunks)
    parts = pl.pallas_call(
        functools.partial(_kernel, rows=rows, splits=splits, decode=_pairs if interpret else _pairs_in_ptx),
        grid=(filled // block_n, splits, -(-m // rows)),
        in_specs=[
            pl.BlockSpec((m, k), lambda j, s, i: (0, 0)),
            pl.BlockSpec((chunks, block_n, 16), lambda j, s, i: (0, j, 0)),
            pl.BlockSpec((chunks, block_n), lambda j, s, i: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, m, block_n), lambda j, s, i: (s, 0, j)),
        out_shape=jax.ShapeDtypeStruct((splits, m, filled), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="mxfp4_matmul",
    )(x, words, scales)
    # Added one by one: XLA's own reduction took another order for another M (seen on an H200).
    return functools.reduce(jnp.add, list(parts))


def _filled(array, along_n, along_k, per_chunk):
    parts = array.reshape(along_n, array.shape[0] // along_n, along_k, array.shape[1] // along_k)
    parts = jnp.pad(parts, ((0, 0), (0, -parts.shape[1] % OUTPUTS), (0, 0), (0, -parts.shape[3] % per_chunk)))
    return parts.reshape(along_n * parts.shape[1], -1)


def _kernel(x_ref, words_ref, scales_ref, out_ref, *, rows, splits, decode):
    m, k = x_ref.shape
    chunks, n, _ = words_ref.shape
    share = -(-chunks // splits)
    begin = pl.program_id(1) * share
    row = pl.program_id(2) * rows + jnp.arange(rows)
    is_row = (row < m)[None, :]

    def tile_of_x(c, step):
        """[16, rows] from x as it lies, with zeros beyond its rows and columns."""
        column = (c * CHUNK + 16 * step + jnp.arange(16))[:, None]
        mask = jnp.broadcast_to(is_row & (column < k) if k % CHUNK else is_row, (16, rows))
        return plgpu.load(x_ref.at[row[None, :], column], mask=mask, other=0.0)

    def add(c, total):
        words = words_ref[c]  # [N, 16]
        four = scales_ref[c]  # [N]
        for step in range(STEPS):
            exponent = (four >> 8 * (step // 2) & 255)[:, None]
            total += jnp.dot(decode(words, exponent, step), tile_of_x(c, step), preferred_element_type=jnp.float32)
        return total

    zeros = jnp.zeros((n, rows), jnp.float32)
    total = jax.lax.fori_loop(begin, jnp.minimum(begin + share, chunks), add, zeros)
    plgpu.store(out_ref.at[row[None, :], jnp.arange(n)[:, None]], total, mask=jnp.broadcast_to(is_row, total.shape))


def pairs_ptx(step: int) -> str:
    """Return PTX that turns words $1 and $2 of a row into $0, the two bfloat16 of a step (0 to 7) times the pair $3."""
    word, (low, sign) = ("$1", "$2")[step // 4], SHIFTS[step % 4]
    shift = [f"{'shr' if by < 0 else 'shl'}.b32 {to}, {word}, {abs(by)};" for to, by in (("a", low), ("b", sign))]
    masked = "and.b32 a, a, 0x81C081C0;" if low == sign else "and.b32 b, b, 0x80008000; lop3.b32 a, a, 0x01C001C0, b, 0xEA;"
    return f"""{{
        .reg .b32 a, b, zero;
        {" ".join(shift)}
        {masked}
        mov.b32 zero, 0x80008000;
        fma.rn.bf16x2 $0, a, $3, zero;
    }}"""  # 0xEA: (a & 0x01C001C0) | b. Adding -0 keeps the sign of zeros; sm_80 has no mul.bf16x2.


def _pairs_in_ptx(words, exponent, step):
    scale = jax.lax.bitcast_convert_type((exponent << 7).astype(jnp.int16), jnp.bfloat16)
    [pairs] = plgpu.elementwise_inline_asm(
        pairs_ptx(step),
        args=[words, jnp.broadcast_to(scale, words.shape)],
        constraints="=r,r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
    )
    return pairs


def _pairs(words, exponent, step):
    """The same in jnp, for the interpreter: int32 [N, 16] and the bits of scales [N, 1] to bfloat16 [N, 16]."""
    n = words.shape[0]
    word, (low, sign) = words.reshape(n, 8, 2)[:, :, step // 4], SHIFTS[step % 4]
    halves = jnp.stack([word, word >> 16], axis=-1).reshape(n, 16)
    magnitude, negative = halves >> 6 - low & 7, halves >> 15 - sign & 1
    value = jnp.where(
        magnitude < 2, magnitude / 2, (2 + magnitude % 2).astype(jnp.float32) * jnp.exp2((magnitude // 2 - 2).astype(jnp.float32))
    )
    scale = jax.lax.bitcast_convert_type(jnp.maximum(exponent - BIAS, 0) << 23, jnp.float32)
    return (jnp.where(negative == 1, -value, value) * scale).astype(jnp.bfloat16)


def why_not(chip: str, dtype: str, n: int, k: int, along_n: int, along_k: int) -> str | None:
    """Return why this kernel cannot be had, as the end of a sentence."""
    if not chip.startswith("sm_") or int(chip[3:]) < 80:
        return "needs an NVIDIA GPU of compute capability 8.0 or more; on an older one use 'reduced'"
    return None if dtype in ("bfloat16", "float16") else "takes bfloat16 and float16; use 'reduced'"


def _run(x, arrays, *, n, chip, format, interpret, used=None):
    return mxfp4_matmul(x, **arrays, n=n, chip=chip, interpret=interpret)


def row_multiple(chip: str, dtype: str) -> int:
    """The most rows that are padded to one number of them."""
    return ONE_WIDTH


DECODE = Product(
    "gpu", ("mxfp4",), why_not, arrange, {"words": ("k", "n", None), "scales": ("k", "n"), "power": ("n",)}, _run, row_multiple
)
