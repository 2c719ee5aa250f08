"""Products on NVIDIA GPUs with plain weights of experts, [E * N, K] as they are stored, that read those alone that some row chose.

As `gpu_tables`, without anything to decode. Notation: R rows of activations, C experts that a row chose, all different, E experts,
N outputs of each, K contracted.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import GPU_EXPERT_PARTS, gpu_blocks
from pallas_kernels.experts import slots
from pallas_kernels.gpu import row_multiple
from pallas_kernels.gpu import why_not as why_not_four_bits
from pallas_kernels.pallas import pl, plgpu
from pallas_kernels.product import PLAIN, Product, as_stored
from pallas_kernels.xla import DOT

CHUNK = 64  # elements of a row at once


@functools.partial(jax.jit, static_argnames=("e", "chip", "interpret"))
def expert_matmul(
    x: jax.Array, experts: jax.Array, weight: jax.Array, *, e: int, chip: str = "", interpret: bool = False
) -> jax.Array:
    """Multiply rows by the weights of the experts that they chose, with f32 accumulation and an f32 result.

    R is padded to 16 or to a multiple of 64, and within both a row's result does not depend on R.

    Args:
      x: [R, C, K] in the weight's dtype, or [R, 1, K] where all of a row's experts are given the same.
      experts: int32 [R, C], -1 for none, whose result is not defined.
      weight: bfloat16 or float16 [E * N, K].
      e: E.
      chip: the compute capability, such as "sm_90", by which block sizes are chosen.
      interpret: run by Pallas's interpreter, on any platform.

    Returns:
      f32 [R, C, N].
    """
    (rows, chosen), n = experts.shape, weight.shape[0] // e
    order, place = slots(experts, e)
    block, splits, warps, stages = gpu_blocks(chip, n * min(e, chosen), -(-x.shape[2] // CHUNK), GPU_EXPERT_PARTS)
    at_once = 16 if rows <= 16 else 64
    shape = (splits, rows, chosen, n)
    given = (order, place, x, weight)
    parts = pl.pallas_call(
        functools.partial(_kernel, at_once=at_once, splits=splits, block=block),
        grid=(-(-n // block), splits, len(order) * -(-rows // at_once)),
        in_specs=[_whole(array.shape) for array in given],
        out_specs=_whole(shape),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="experts",
    )(*given)
    return functools.reduce(jnp.add, list(parts))  # one by one, as in `gpu`


def _whole(shape):
    return pl.BlockSpec(shape, lambda j, s, i: (0,) * len(shape))


def _kernel(order_ref, place_ref, x_ref, weight_ref, out_ref, *, at_once, splits, block):
    j, split, i = (pl.program_id(axis) for axis in range(3))
    (rows, width, k), n = x_ref.shape, out_ref.shape[3]
    slot, row = i % order_ref.shape[0], i // order_ref.shape[0] * at_once + jnp.arange(at_once)
    place = plgpu.load(place_ref.at[slot, row], mask=row < rows, other=-1)
    output = j * block + jnp.arange(block)
    chunks = -(-k // CHUNK)
    share = -(-chunks // splits)

    def add(c, total):
        column = c * CHUNK + jnp.arange(CHUNK)
        there = jnp.broadcast_to((output < n)[:, None] & (column < k)[None], (block, CHUNK))
        w = plgpu.load(weight_ref.at[order_ref[slot] * n + output[:, None], column[None]], mask=there, other=0.0)
        mask = (place >= 0)[None] & (column < k)[:, None]
        x = plgpu.load(x_ref.at[row[None], jnp.clip(place, 0, width - 1)[None], column[:, None]], mask=mask, other=0.0)
        return total + jnp.dot(w, x, preferred_element_type=jnp.float32)

    @pl.when(jnp.max(place) >= 0)
    def _():
        zeros = jnp.zeros((block, at_once), jnp.float32)
        total = jax.lax.fori_loop(split * share, jnp.minimum(split * share + share, chunks), add, zeros)
        mask = (place >= 0)[None] & (output < n)[:, None]
        plgpu.store(out_ref.at[split, row[None], jnp.maximum(place, 0)[None], output[:, None]], total, mask=mask)


def why_not(chip: str, dtype: str, n: int, k: int, along_n: int, along_k: int) -> str | None:
    """Return why this kernel cannot be had, as the end of a sentence."""
    reason = why_not_four_bits(chip, dtype, n, k, along_n, along_k)
    return None if reason is None else reason.replace("'reduced'", "'dot'")


def _by_experts(x, experts, arrays, *, e, n, chip, format, interpret):
    weight = arrays["weight"]
    return expert_matmul(x.astype(weight.dtype), experts, weight, e=e, chip=chip, interpret=interpret)


EXPERTS = Product("gpu experts", (PLAIN,), why_not, as_stored, DOT.axes, DOT.run, row_multiple, _by_experts)
