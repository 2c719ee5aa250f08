"""MXFP4 products on NVIDIA GPUs from sm_80 on: nibbles become float16 pairs in registers and go to the tensor cores.

Written in Pallas for its Triton compiler. Notation: M rows of activations, N outputs, K contracted, C chunks of 128 along K. An
*MX block* is the 32 elements that share a scale, a *kernel tile* is what one program of the grid loads at a time.

An E2M1 code s|ee|m in the bits s000eem0 of a float16's upper byte has its own value times 2^-14 (E2M1's 0.5 is then subnormal,
which tensor cores honour in float16), so decoding is shifts and masks. For that, each row of x becomes float16 too, times the
power of two that brings its largest magnitude to [2^14, 2^15): what is lost is below 2^-39 of that largest, and f32 sums lose more.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.blocks import gpu_blocks

CHUNK = 128  # elements of a row in 16 words, one 16-byte load for each of four threads
OUTPUTS = 64  # what N is a multiple of: every block size of `gpu_blocks` divides it
STEPS = CHUNK // 16  # products of 16 elements each, the tensor cores' own size


def lay_out(packed: jax.Array, scales: jax.Array, along_n: int = 1, along_k: int = 1) -> tuple[jax.Array, jax.Array]:
    """Return an MXFP4 weight as the kernel reads it: chunks of 128 along K, one row after the other within a chunk.

    Words 2i and 2i + 1 of a row's 16 in a chunk hold elements 16 s + 2i (lower halves) and 16 s + 2i + 1 (upper halves): the first
    word the steps s = 0..3, the second the steps 4..7, step s in bits 4 (s mod 4) to 4 (s mod 4) + 3 of either half. The four
    scales of a chunk are the bytes of one word, the first lowest. N is filled up to whole 64s and K to whole 128s with zeros.

    Args:
      packed: uint8 [N, K/2], element 2i in the low half of byte i.
      scales: uint8 [N, K/32].
      along_n: number of equal parts of N that will lie on different devices, each filled up by itself.
      along_k: likewise of K.

    Returns:
      (int32 [C, N, 16], int32 [C, N]).
    """
    packed, scales = (_filled(array, along_n, along_k, per_chunk) for array, per_chunk in ((packed, 64), (scales, 4)))
    n = packed.shape[0]
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(n, -1, 2, 4, 8, 2)  # [N, C, word, nibble, pair, half]
    shift = 4 * jnp.arange(4)[:, None, None] + 16 * jnp.arange(2)
    words = jnp.sum(codes.astype(jnp.uint32) << shift.astype(jnp.uint32), axis=(3, 5), dtype=jnp.uint32)  # [N, C, word, pair]
    words = jnp.transpose(words, (1, 0, 3, 2)).reshape(-1, n, 16)
    scales = scales.reshape(n, -1, 4)
    scales = jnp.sum(scales.astype(jnp.uint32) << 8 * jnp.arange(4, dtype=jnp.uint32), axis=2, dtype=jnp.uint32).T
    return tuple(jax.lax.bitcast_convert_type(array, jnp.int32) for array in (words, scales))


@functools.partial(jax.jit, static_argnames=("n", "chip", "interpret"))
def mxfp4_matmul(
    x: jax.Array, words: jax.Array, scales: jax.Array, *, n: int, chip: str = "", interpret: bool = False
) -> jax.Array:
    """x @ w.T for a weight laid out by `lay_out`, with f32 accumulation and an f32 result.

    M is padded to 16 or to a multiple of 64, and within each of the two a row's result does not depend on M.

    Args:
      x: bfloat16 or float16 [M, K].
      words: int32 [C, N, 16].
      scales: int32 [C, N].
      n: number of outputs before N was filled up.
      chip: the compute capability, such as "sm_90", by which block sizes are chosen.
      interpret: run by Pallas's interpreter, on any platform.

    Returns:
      f32 [M, N].
    """
    m, k = x.shape
    chunks, filled = scales.shape
    if chunks != -(-k // CHUNK) or words.shape != (chunks, filled, 16) or filled != n + -n % OUTPUTS:
        raise ValueError(
            f"x {list(x.shape)} does not belong to words {list(words.shape)} and scales {list(scales.shape)} of {n} outputs; "
            f"give words [C, N, 16] and scales [C, N], N filled up to whole {OUTPUTS}s and K to C chunks of {CHUNK}"
        )
    rows = 16 if m <= 16 else m + -m % 64
    block_m = min(rows, 64)
    block_n, splits, warps, stages = gpu_blocks(chip, filled, chunks)
    x, exponent = _to_float16(jnp.pad(x, ((0, rows - m), (0, chunks * CHUNK - k))))
    sums = pl.pallas_call(
        functools.partial(_kernel, splits=splits, decode=_pairs if interpret else _pairs_in_ptx),
        grid=(filled // block_n, splits, rows // block_m),
        in_specs=[
            pl.BlockSpec((chunks, STEPS, 16, block_m), lambda j, s, i: (0, 0, 0, i)),
            pl.BlockSpec((chunks, block_n, 16), lambda j, s, i: (0, j, 0)),
            pl.BlockSpec((chunks, block_n), lambda j, s, i: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, block_n, block_m), lambda j, s, i: (s, j, i)),
        out_shape=jax.ShapeDtypeStruct((splits, filled, rows), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="mxfp4_matmul",
    )(x.T.reshape(chunks, STEPS, 16, rows), words, scales)
    # Added one by one: XLA's own reduction took another order for another M (seen on an H200).
    return (functools.reduce(jnp.add, list(sums)).T * jnp.ldexp(jnp.float32(1), exponent))[:m, :n]


def _filled(array, along_n, along_k, per_chunk):
    parts = array.reshape(along_n, array.shape[0] // along_n, along_k, array.shape[1] // along_k)
    parts = jnp.pad(parts, ((0, 0), (0, -parts.shape[1] % OUTPUTS), (0, 0), (0, -parts.shape[3] % per_chunk)))
    return parts.reshape(along_n * parts.shape[1], -1)


def _kernel(x_ref, words_ref, scales_ref, out_ref, *, splits, decode):
    chunks, steps, _, rows = x_ref.shape
    n = words_ref.shape[1]
    share = -(-chunks // splits)
    begin = pl.program_id(1) * share

    def add(c, total):
        words = words_ref[c]  # [N, 16]
        four = scales_ref[c]  # [N]
        for block in range(steps // 2):
            partial = jnp.zeros((n, rows), jnp.float32)
            for step in (2 * block, 2 * block + 1):
                partial += jnp.dot(decode(words, step), x_ref[c, step], preferred_element_type=jnp.float32)
            # A float32 whose exponent is the byte; the byte 0 is the number 0.
            scale = jax.lax.bitcast_convert_type((four >> 8 * block & 255) << 23, jnp.float32)
            total += partial * scale[:, None]
        return total

    zeros = jnp.zeros((n, rows), jnp.float32)
    out_ref[...] = jax.lax.fori_loop(begin, jnp.minimum(begin + share, chunks), add, zeros)


def pairs_ptx(step: int) -> str:
    """Return PTX that turns words $1 and $2 of a row into $0, the two float16 of a step (0 to 7), times 2^-14."""
    word, at = ("$1", "$2")[step // 4], 4 * (step % 4)
    magnitude = ("shl", 9 - at) if at <= 9 else ("shr", at - 9)
    return f"""{{
        .reg .b32 a, b;
        {magnitude[0]}.b32 a, {word}, {magnitude[1]};
        and.b32 a, a, 0x0E000E00;
        shl.b32 b, {word}, {12 - at};
        lop3.b32 $0, b, 0x80008000, a, 0xEA;
    }}"""  # 0xEA: (b & 0x80008000) | a


def _pairs_in_ptx(words, step):
    result = jax.ShapeDtypeStruct(words.shape, jnp.float16)
    [pairs] = plgpu.elementwise_inline_asm(
        pairs_ptx(step), args=[words], constraints="=r,r,r", pack=2, result_shape_dtypes=[result]
    )
    return pairs


def _pairs(words, step):
    """The same in jnp, for the interpreter: int32 [N, 16] to float16 [N, 16], times 2^-14."""
    n = words.shape[0]
    word = words.reshape(n, 8, 2)[:, :, step // 4] >> 4 * (step % 4)
    word = jnp.stack([word, word >> 16], axis=-1)
    bits = ((word & 7) << 9 | (word & 8) << 12).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).reshape(n, 16)


def _to_float16(x):
    """Return (x * 2^(14 - e) as float16 [M, K], e int32 [M, 1]), 2^e being the largest power of two up to a row's magnitudes.

    A row with an infinity or NaN keeps it; what else it holds matters no more.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), axis=1, keepdims=True)
    exponent = jnp.clip((jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 127, -110, 127)
    # In two factors, none of which overflows or is subnormal.
    half = (14 - exponent) // 2
    power = [jax.lax.bitcast_convert_type(e + 127 << 23, jnp.float32) for e in (half, 14 - exponent - half)]
    return (x * power[0] * power[1]).astype(jnp.float16), exponent
