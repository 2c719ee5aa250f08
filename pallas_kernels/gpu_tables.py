"""Products on NVIDIA GPUs with weights in any format, of one weight and of experts: one kernel, told what codes stand for.

As `gpu`, written in Pallas for its Triton compiler. Codes become exact 16-bit floats in registers, 16 of a row at a time go to the
tensor cores, and the sums of a group are multiplied by its scale.

A weight may be that of E experts. Programs are as many as the experts that rows can choose; each looks up which one is its, and
which rows chose that, and where none did it ends at once. Every row writes the results of its own experts, each summed in one
order.

Notation: R rows of activations, C experts that a row chose, all different, E experts, N outputs of each, K contracted, S steps of
16 elements along K in a chunk.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import GPU_EXPERT_PARTS, gpu_blocks
from pallas_kernels.experts import slots
from pallas_kernels.gpu import OUTPUTS, row_multiple
from pallas_kernels.gpu import why_not as why_not_four_bits
from pallas_kernels.pallas import pl, plgpu
from pallas_kernels.product import Product
from pallas_kernels.reference import unpacked
from pallas_kernels.tables import FORMATS, by_output, numbers, small_floats, times_factors, weight_by_weight

WORDS = 16  # of a row in a chunk; each has one code, or the lower four bits of one, for each step


def steps_of(format: Any) -> int:
    """Return S."""
    return 4 if format.bits == 8 else 8


def arrange(
    codes: jax.Array,
    scales: jax.Array,
    minima: jax.Array | None = None,
    *,
    format: Any,
    experts: int = 1,
    along_n: int = 1,
    along_k: int = 1,
) -> dict[str, jax.Array]:
    """Return a stored weight as the kernel reads it: chunks of 16 S along K, one row after the other within a chunk.

    Word i of a row's 16 holds element 16 s + i of the chunk in its s-th byte, or of four and six bits its lower four bits in the
    s-th half byte; `upper` holds the upper two of six bits likewise. N is filled up to whole 64s, of each expert, and K to whole
    chunks, with zeros.

    Args:
      codes, scales, minima: as the format stores them, [E * N, ...].
      format: the weight's.
      experts: E.
      along_n: number of equal parts of N that will lie on different devices, each filled up by itself.
      along_k: likewise of K.

    Returns:
      words: int32 [K / 16 S, E * N, 16]; upper, of six bits: int16 of that shape; scales: as they are stored, [K / group, E * N],
      minima likewise, or factors: f32 [E, N], where a whole row has one scale.
    """
    parts, steps = experts * along_n, steps_of(format)
    n, k = codes.shape[0] // parts, codes.shape[1] * 8 // format.bits // along_k
    whole = k + -k % (WORDS * steps)

    def filled(array, step):
        array = array.reshape(parts, n, along_k, -1)
        array = jnp.pad(array, ((0, 0), (0, -n % OUTPUTS), (0, 0), (0, -(-whole // step) - array.shape[3])))
        return array.reshape(parts * array.shape[1], -1)

    elements = filled(unpacked(codes, format.bits), 1).astype(jnp.uint32)
    elements = elements.reshape(elements.shape[0], -1, steps, WORDS)
    bits, step = (8 if format.bits == 8 else 4), jnp.arange(steps, dtype=jnp.uint32)[None, None, :, None]
    words = jnp.sum((elements & 2**bits - 1) << bits * step, axis=2, dtype=jnp.uint32)
    found = {"words": jnp.swapaxes(jax.lax.bitcast_convert_type(words, jnp.int32), 0, 1)}
    if format.bits == 6:
        upper = jnp.sum(elements >> 4 << 2 * step, axis=2, dtype=jnp.uint32).astype(jnp.uint16)
        found["upper"] = jnp.swapaxes(jax.lax.bitcast_convert_type(upper, jnp.int16), 0, 1)
    if format.group is None:
        return found | {"factors": scales.astype(jnp.float32).reshape(experts, -1)}
    found["scales"] = filled(by_output(scales, format, parts * n), format.group).T
    return found if minima is None else found | {"minima": filled(minima, format.group).T}


def expert_matmul(
    x: jax.Array,
    experts: jax.Array,
    arrays: Mapping[str, jax.Array],
    *,
    e: int,
    n: int,
    format: Any,
    chip: str = "",
    interpret: bool = False,
) -> jax.Array:
    """Multiply rows by the weights of the experts that they chose, with f32 accumulation and an f32 result.

    R is padded to 8, to 16 or to a multiple of 64, and within each of them a row's result does not depend on R.

    Args:
      x: bfloat16 or float16 [R, C, K], or [R, 1, K] where all of a row's experts are given the same.
      experts: int32 [R, C], -1 for none, whose result is not defined.
      arrays: of `arrange`.
      e, n: E, and N before it was filled up.
      format: the weight's.
      chip: the compute capability, such as "sm_90", by which block sizes are chosen.
      interpret: run by Pallas's interpreter, on any platform.

    Returns:
      f32 [R, C, N].
    """
    y = _matmul(x, experts, dict(arrays), e, n, format, chip, interpret)
    return times_factors(y, experts, arrays)


@functools.partial(jax.jit, static_argnames=("e", "n", "format", "chip", "interpret"))
def _matmul(x, experts, arrays, e, n, format, chip, interpret):
    rows, chosen = experts.shape
    chunks, filled, _ = arrays["words"].shape
    filled = filled // e
    order, place = slots(experts, e)
    block, splits, warps, stages = gpu_blocks(chip, filled * min(e, chosen), chunks, GPU_EXPERT_PARTS if e > 1 else None)
    at_once = 8 if rows <= 8 else 16 if rows <= 16 else 64
    read = {role: array for role, array in arrays.items() if role != "factors"}
    given = [order, place, x, *read.values()]
    shape, shares = (splits, rows, chosen, n), {"splits": splits, "block": block, "filled": filled}
    parts = pl.pallas_call(
        functools.partial(_kernel, roles=tuple(read), format=format, at_once=at_once, interpret=interpret, **shares),
        grid=(filled // block, splits, len(order) * -(-rows // at_once)),
        in_specs=[_whole(array.shape) for array in given],
        out_specs=_whole(shape),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=f"{format.name}_table",
    )(*given)
    return functools.reduce(jnp.add, list(parts))  # one by one, as in `gpu`


def _whole(shape):
    return pl.BlockSpec(shape, lambda j, s, i: (0,) * len(shape))


def _kernel(order_ref, place_ref, x_ref, *refs, roles, format, at_once, splits, block, filled, interpret):
    *refs, out_ref = refs
    ref = dict(zip(roles, refs, strict=True))
    j, split, i = (pl.program_id(axis) for axis in range(3))
    rows, width, k = x_ref.shape
    slot, row = i % order_ref.shape[0], i // order_ref.shape[0] * at_once + jnp.arange(at_once)
    place = plgpu.load(place_ref.at[slot, row], mask=row < rows, other=-1)  # among its row's experts, -1 where it is none
    outputs = pl.ds(order_ref[slot] * filled + j * block, block)
    chunks, steps = ref["words"].shape[0], steps_of(format)
    share = -(-chunks // splits)
    bits, whole = (8 if format.bits == 8 else 4), k % (WORDS * steps) == 0

    def tile_of_x(first):
        """[16, rows] from x as it lies, with zeros beyond its columns and of rows that did not choose this expert."""
        column = (first + jnp.arange(WORDS))[:, None]
        mask = jnp.broadcast_to((place >= 0)[None] if whole else (place >= 0)[None] & (column < k), (WORDS, at_once))
        return plgpu.load(x_ref.at[row[None], jnp.clip(place, 0, width - 1)[None], column], mask=mask, other=0.0)

    def add(c, total):
        words = ref["words"][c, outputs]
        upper = ref["upper"][c, outputs].astype(jnp.int32) if "upper" in ref else None
        of_group = min(steps, (format.group or WORDS * steps) // WORDS)
        for first in range(0, steps, of_group):
            partial, sums = jnp.zeros((block, at_once), jnp.float32), jnp.zeros((block, at_once), jnp.float32)
            for step in range(first, first + of_group):
                codes = words >> bits * step & 2**bits - 1
                codes = codes if upper is None else codes | (upper >> 2 * step & 3) << 4
                x = tile_of_x(WORDS * (c * steps + step))
                partial += jnp.dot(_values(codes, format.element, interpret).astype(x.dtype), x, preferred_element_type=jnp.float32)
                if "minima" in ref:
                    sums += jnp.dot(jnp.ones((block, WORDS), x.dtype), x, preferred_element_type=jnp.float32)
            if format.group is not None:
                group = WORDS * (c * steps + first) // format.group
                partial *= _scales(ref["scales"][group, outputs], format, interpret)[:, None]
                if "minima" in ref:
                    partial += sums * ref["minima"][group, outputs].astype(jnp.float32)[:, None]
            total += partial
        return total

    @pl.when(jnp.max(place) >= 0)
    def _():
        zeros = jnp.zeros((block, at_once), jnp.float32)
        total = jax.lax.fori_loop(split * share, jnp.minimum(split * share + share, chunks), add, zeros)
        column = j * block + jnp.arange(block)[:, None]
        mask = jnp.broadcast_to((place >= 0)[None] & (column < out_ref.shape[3]), total.shape)
        plgpu.store(out_ref.at[split, row[None], jnp.maximum(place, 0)[None], column], total, mask=mask)


def _values(codes, element, interpret):
    """What int32 codes stand for, f32; all are exact in 16 bits too."""
    if hasattr(element, "offset"):  # numbers between 2^23 and 2^24 are whole
        return jax.lax.bitcast_convert_type(codes | 0x4B000000, jnp.float32) - float(2**23 + element.offset)
    return _floats(codes, element.exponent_bits, element.mantissa_bits, interpret)


def _floats(codes, exponent_bits, mantissa_bits, interpret):
    """Small floats: where the bits lie as in an f32, a power of two is all that they lack, of subnormal ones too."""
    if interpret:  # on CPU XLA takes subnormal numbers for zero
        return small_floats(codes, exponent_bits, mantissa_bits)
    lacking = 2.0 ** (128 - 2 ** (exponent_bits - 1))
    return jax.lax.bitcast_convert_type(placed(codes, exponent_bits, mantissa_bits), jnp.float32) * lacking


def placed(codes: jax.Array, exponent_bits: int, mantissa_bits: int) -> jax.Array:
    """Return int32 codes of a small float as the bits of an f32 with that sign, exponent and mantissa."""
    bits = exponent_bits + mantissa_bits
    return (codes & 2**bits - 1) << 23 - mantissa_bits | codes >> bits << 31


def _scales(scales, format, interpret):
    return _floats(scales.astype(jnp.int32), 4, 3, interpret) if format.scale == "e4m3" else numbers(scales, format)


def why_not(chip: str, dtype: str, n: int, k: int, along_n: int, along_k: int) -> str | None:
    """Return why this kernel cannot be had, as the end of a sentence."""
    reason = why_not_four_bits(chip, dtype, n, k, along_n, along_k)
    return None if reason is None else reason.replace("'reduced'", "'decoded'")


def _by_experts(x, experts, arrays, *, e, n, chip, format, interpret):
    return expert_matmul(x, experts, arrays, e=e, n=n, format=format, chip=chip, interpret=interpret)


AXES: dict[str, tuple[str | None, ...]] = {
    "words": ("k", "n", None),
    "upper": ("k", "n", None),
    "scales": ("k", "n"),
    "minima": ("k", "n"),
    "factors": (None, "n"),
}
TABLE = Product("gpu table", FORMATS, why_not, arrange, AXES, weight_by_weight(_by_experts), row_multiple, _by_experts)
