"""Products on TPU with weights in any format, of one weight and of experts: one kernel, told what codes and scales stand for.

As `tpu`, whose words these are. Small floats become E5M2, which the matrix unit multiplies with bfloat16: those with two bits of
mantissa by a shift, those with three as the sum of two, since each is the mean of its neighbours with two. Integers become
bfloat16. What decoded elements lack is a power of two, which x carries.

A weight may be that of E experts. The kernel goes through those that some row chose, whose numbers lie in scalar memory before it
starts, so that each step knows which block to fetch, and no other is read. A row of x takes part in the products of its experts,
and adds zero to those of the others.

Notation: R rows of activations, C experts that a row chose, all different, E experts, N outputs of each, K contracted, T tiles.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import ROWS, tpu_block_n, tpu_tile
from pallas_kernels.experts import chunk_by_chunk, hits
from pallas_kernels.pallas import pl, pltpu
from pallas_kernels.product import Product
from pallas_kernels.reference import unpacked
from pallas_kernels.tables import FORMATS, WITHOUT_SUBNORMALS, by_output, is_integer, numbers, times_factors, weight_by_weight
from pallas_kernels.tpu import CONTRACTED, LANES, PALLAS_TPUS, each_byte, float8, left_in_hbm, row_multiple

MOST_K = 2**15  # the activations of all of K are kept on the chip, those of each expert
WIDE = 128  # rows that are taken at once, where there are more than `ROWS`
MEMORY = 48 << 20  # bytes of the chip's own memory that a kernel may take
WIDE_BLOCK = 512  # outputs at once, where rows are many or codes have eight bits


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
    """Return a stored weight as the kernel reads it: K before N, in tiles, those of each expert by themselves.

    Of four bits, floats lie two a byte as in `tpu.arrange`, integers less 8 with row 2i in the low half of byte i. Of six bits, a
    tile's quarters lie with their lower four bits two a byte, the first two before the others, and with their upper two four a
    byte. Integers of eight bits lie less 128. N is filled up to whole 128s: XLA would store other sizes with K last, and copy all
    of it.

    Args:
      codes, scales, minima: as the format stores them, [E * N, ...].
      format: the weight's.
      experts: E.
      along_n: number of equal parts of N that will lie on different devices, each filled up by itself.
      along_k: likewise of K, each in tiles of its own.

    Returns:
      codes: [E, T, tile (of four or six bits tile/2), N]; upper, of six bits: uint8 [E, T, tile/4, N]; scales: uint8 or f32
      [E, T, tile/group, N], minima likewise, or factors: f32 [E, N], where a whole row has one scale.
    """
    n, k = codes.shape[0] // experts // along_n, codes.shape[1] * 8 // format.bits // along_k
    tile = tpu_tile(k)

    def tiled(array, step):
        """[E N, K / step] to [E, T, tile / step, N]."""
        array = array.reshape(experts * along_n, n, along_k, -1)
        array = jnp.pad(array, ((0, 0), (0, -n % LANES), (0, 0), (0, -array.shape[3] % (tile // step))))
        return jnp.transpose(array.reshape(experts, along_n * array.shape[1], -1, tile // step), (0, 2, 3, 1))

    elements = tiled(unpacked(codes, format.bits).astype(jnp.uint8), 1)
    found = _packed(elements, format)
    if format.group is None:
        return found | {"factors": scales.astype(jnp.float32).reshape(experts, -1)}
    scales = by_output(scales, format, codes.shape[0])
    scales = scales if scales.dtype == jnp.uint8 else scales.astype(jnp.float32)
    if minima is not None:
        less = 2.0 ** (format.bits - 1) - format.element.offset  # than their codes the elements are here
        found["minima"] = tiled(minima.astype(jnp.float32) + less * scales, format.group)
    return found | {"scales": tiled(scales, format.group)}


def _packed(elements, format):
    """Arrays of codes, uint8 [E, T, tile, N]."""
    quarters = jnp.split(elements, 4, axis=2)
    if is_integer(format):
        elements = elements ^ jnp.uint8(2 ** (format.bits - 1))  # two's complement
        if format.bits == 8:
            return {"codes": jax.lax.bitcast_convert_type(elements, jnp.int8)}
        return {"codes": elements[:, :, ::2] & 15 | elements[:, :, 1::2] << 4}
    if format.bits == 4:
        first, second = jnp.split(elements, 2, axis=2)
        return {"codes": (first & 7) << 4 | first >> 3 | (second & 7) << 1 | second >> 3 << 7}
    if format.bits == 6:
        lower = [quarters[i] & 15 | quarters[i + 1] << 4 for i in (0, 2)]
        upper = [quarter >> 4 << 2 * i for i, quarter in enumerate(quarters)]
        return {"codes": jnp.concatenate(lower, axis=2), "upper": functools.reduce(jnp.bitwise_or, upper)}
    return {"codes": elements}


def expert_matmul(
    x: jax.Array,
    experts: jax.Array,
    arrays: Mapping[str, jax.Array],
    *,
    n: int,
    format: Any,
    subnormals: bool = True,
    interpret: "bool | pltpu.InterpretParams" = False,
) -> jax.Array:
    """Multiply rows by the weights of the experts that they chose, with f32 accumulation and an f32 result.

    R is padded to 8, to 16, or to a multiple of 128, and within each of the three a row's result does not depend on R. With more
    than 16 rows, groups of less than 128 are scaled before they are multiplied, and rounded to bfloat16 by that.

    Args:
      x: bfloat16 [R, C, K], or [R, 1, K] where all of a row's experts are given the same.
      experts: int32 [R, C], -1 for none, whose result is not defined.
      arrays: of `arrange`.
      n: N before it was filled up.
      format: the weight's.
      subnormals: whether the matrix unit honours subnormal E5M2 numbers; without them floats of four bits alone are decoded.
      interpret: run by an interpreter, on any platform.

    Returns:
      f32 [R, C, N].
    """
    run = functools.partial(_matmul, format=format, subnormals=subnormals, interpret=interpret)
    return times_factors(chunk_by_chunk(run, x, experts, dict(arrays), WIDE)[..., :n], experts, arrays)


@functools.partial(jax.jit, static_argnames=("format", "subnormals", "interpret"))
def _matmul(x, experts, arrays, format, subnormals, interpret):
    rows, chosen = experts.shape
    e, tiles, packed, n = arrays["codes"].shape
    tile = packed if format.bits == 8 else 2 * packed
    wide = rows > ROWS[-1]
    filled = WIDE if wide else next(each for each in ROWS if rows <= each)
    x = jnp.pad(x, ((0, filled - rows), (0, 0), (0, tiles * tile - x.shape[2])))
    x = jnp.transpose(x.reshape(filled, -1, tiles, tile), (2, 1, 0, 3))  # [T, C, R, tile]
    given = {}
    if "minima" in arrays:
        given["sums"] = jnp.sum(x.astype(jnp.float32).reshape(*x.shape[:3], -1, format.group), axis=-1)
    # Each row becomes so many, every one with the elements of one group in so many and zeros elsewhere.
    spread = 1 if wide else max(1, CONTRACTED // (format.group or CONTRACTED))
    x = x * jnp.asarray(_carried(format, subnormals), x.dtype)
    if spread > 1:
        of_group = jnp.arange(tile)[None, :] // format.group % spread == jnp.arange(spread)[:, None]
        x = jnp.where(of_group[None, None, :, None], x[:, :, None], 0).reshape(tiles, -1, spread * filled, tile)
    its = jnp.pad(experts, ((0, filled - rows), (0, 0)), constant_values=-1).T
    given |= {"x": x, "experts": jnp.broadcast_to(its[:, None], (chosen, spread, filled)).reshape(chosen, -1, 1)}
    order, count = hits(experts, e)
    read = {role: array for role, array in arrays.items() if role != "factors"}
    if e > 1 and not interpret:
        read = {role: left_in_hbm(array) for role, array in read.items()}
    block = block_of(n, tiles, wide, format)

    def whole(array):
        return pl.BlockSpec(array.shape, lambda j, i, t, order: (0,) * array.ndim)

    def of_expert(array):
        return pl.BlockSpec((None, None, array.shape[2], block), lambda j, i, t, order: (order[i], t, 0, j))

    moved = sum(array.size * array.dtype.itemsize // e for array in read.values()) * min(e, chosen) + 4 * rows * chosen * n
    y = pl.pallas_call(
        functools.partial(_kernel, roles=(*given, *read), format=format, wide=wide, subnormals=subnormals),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(n, block), count if e > 1 else 1, tiles),
            in_specs=[*map(whole, given.values()), *map(of_expert, read.values())],
            out_specs=pl.BlockSpec((chosen, filled, block), lambda j, i, t, order: (0, 0, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((chosen, filled, n), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=MEMORY),
        cost_estimate=pl.CostEstimate(
            flops=2 * filled * min(e, chosen) * tiles * tile * n, bytes_accessed=moved, transcendentals=0
        ),
        interpret=interpret,
        name=f"{format.name}_table",
    )(order, *given.values(), *read.values())
    return jnp.swapaxes(y[:, :rows], 0, 1)


def block_of(n: int, tiles: int, wide: bool, format: Any) -> int:
    """Return how many outputs the kernel computes at once."""
    block = tpu_block_n(n, tiles)
    return min(WIDE_BLOCK, block) if wide or format.bits == 8 else block


def _kernel(order_ref, *refs, roles, format, wide, subnormals):
    *refs, out_ref = refs
    ref = dict(zip(roles, refs, strict=True))
    i, t = pl.program_id(1), pl.program_id(2)
    rows, group = out_ref.shape[1], format.group
    spread = ref["experts"].shape[1] // rows

    @pl.when((i == 0) & (t == 0))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    its = [ref["experts"][c] == order_ref[i] for c in range(out_ref.shape[0])]  # bool [spread * R, 1]

    def of_its(ref):
        """What is given to this expert, of [T, C, ...]."""
        if ref.shape[1] == 1:
            return ref[t, 0]
        return functools.reduce(jnp.add, [jnp.where(its[c][: ref.shape[2]], ref[t, c], 0) for c in range(len(its))])

    x, parts = of_its(ref["x"]), _decoded(ref, format, subnormals)
    scales = numbers(ref["scales"][...], format) if "scales" in ref else None
    total = jnp.zeros(out_ref.shape[1:], jnp.float32)
    for start, addends in parts:
        length = addends[0].shape[0]
        for at in range(0, length, CONTRACTED if scales is not None else length):
            first, width = start + at, min(CONTRACTED, length - at) if scales is not None else length
            given, pieces = x[:, first : first + width], [addend[at : at + width] for addend in addends]
            if wide and scales is not None and group < CONTRACTED:
                scale = scales[first // group : (first + width) // group, None]
                weight = functools.reduce(jnp.add, [piece.astype(jnp.float32) for piece in pieces])
                weight = (weight.reshape(width // group, group, -1) * scale).reshape(width, -1).astype(jnp.bfloat16)
                total += jnp.dot(given, weight, preferred_element_type=jnp.float32)
                continue
            partial = [jnp.dot(given, piece, preferred_element_type=jnp.float32) for piece in pieces]
            partial = functools.reduce(jnp.add, partial)
            if scales is None:
                total += partial
                continue
            for g in range(first // group, first // group + max(1, width // group)):
                total += partial[g % spread * rows : (g % spread + 1) * rows] * scales[g][None]
    if "minima" in ref:
        sums, highest = of_its(ref["sums"]), jax.lax.Precision.HIGHEST
        total += jnp.dot(sums, ref["minima"][...], preferred_element_type=jnp.float32, precision=highest)
    for c, mask in enumerate(its):
        out_ref[c] += jnp.where(mask[:rows], total, 0)


def _carried(format, subnormals):
    """What x is multiplied by for what decoded elements lack."""
    if is_integer(format) or not subnormals:
        return 1.0
    bias = 2 ** (format.element.exponent_bits - 1) - 1
    return 2.0 ** (15 - bias) / (2 if format.element.mantissa_bits > 2 else 1)


def _decoded(ref, format, subnormals):
    """Return parts of a tile along K: (where it starts, matrices [rows, N] whose sum its elements are, but for what x carries)."""
    codes = ref["codes"][...]
    if is_integer(format):
        codes = pltpu.bitcast(codes, jnp.int4) if format.bits == 4 else codes
        return [(0, [codes.astype(jnp.bfloat16)])]
    if format.bits == 4:
        return [(i * codes.shape[0], [half]) for i, half in enumerate(float8(codes, subnormals))]
    if format.bits == 8:
        return [(0, _two_bit_mantissas(pltpu.bitcast(codes, jnp.int32), format.element))]
    lower, upper = pltpu.bitcast(codes, jnp.int32), pltpu.bitcast(ref["upper"][...], jnp.int32)
    quarter, found = upper.shape[0], []
    for i in range(4):
        of_quarter = lower[i // 2 * quarter : (i // 2 + 1) * quarter] >> 4 * (i % 2) & each_byte(0x0F)
        words = of_quarter | (upper >> 2 * i & each_byte(0x03)) << 4
        found.append((4 * i * quarter, _two_bit_mantissas(words, format.element)))
    return found


def _two_bit_mantissas(words, element):
    """Four codes a word, int32 [rows / 4, N], as E5M2 [rows, N]: one, or two neighbours of those with three bits of mantissa."""
    largest = 2 ** (element.bits - 1) - 1
    magnitude, sign = words & each_byte(largest), (words & each_byte(largest + 1)) << 8 - element.bits
    if element.mantissa_bits == 2:
        return [pltpu.bitcast(magnitude | sign, jnp.float8_e5m2)]
    above = magnitude + (magnitude & each_byte(1))
    halved = magnitude >> 1 & each_byte(largest >> 1), above >> 1 & each_byte(largest)
    return [pltpu.bitcast(each | sign, jnp.float8_e5m2) for each in halved]


def why_not(chip: str, dtype: str, n: int, k: int, along_n: int, along_k: int) -> str | None:
    """Return why this kernel cannot be had, as the end of a sentence."""
    if chip not in PALLAS_TPUS:
        return "needs a TPU v5e, v5p, v6e or 7x; on another TPU use 'decoded'"
    if k // along_k > MOST_K:
        return f"takes K up to {MOST_K} on a device; use 'decoded'"
    return None if dtype == "bfloat16" else "takes bfloat16 alone; use 'decoded'"


def _by_experts(x, experts, arrays, *, e, n, chip, format, interpret, subnormals=True):
    return expert_matmul(x, experts, arrays, n=n, format=format, subnormals=subnormals, interpret=interpret)


_without = functools.partial(_by_experts, subnormals=False)
AXES: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("codes", "upper", "scales", "minima"), (None, "k", None, "n")),
    "factors": (None, "n"),
}
TABLE = Product("tpu table", FORMATS, why_not, arrange, AXES, weight_by_weight(_by_experts), row_multiple, _by_experts)
TABLE_WITHOUT_SUBNORMALS = TABLE._replace(
    name="tpu table without subnormals", formats=WITHOUT_SUBNORMALS, run=weight_by_weight(_without), by_experts=_without
)
