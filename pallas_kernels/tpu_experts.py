"""Products on TPU with plain weights of experts, [E * N, K] as they are stored, that read those alone that some row chose.

As `tpu_tables`, with whole rows of K at a time. Notation: R rows of activations, C experts that a row chose, all different, E
experts, N outputs of each, K contracted.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import ROWS, tpu_rows
from pallas_kernels.experts import chunk_by_chunk, hits
from pallas_kernels.pallas import pl, pltpu
from pallas_kernels.product import PLAIN, Product, as_stored
from pallas_kernels.tpu import PALLAS_TPUS, left_in_hbm, row_multiple
from pallas_kernels.tpu_tables import MEMORY, WIDE
from pallas_kernels.xla import DOT

MOST_K = 2**15


@functools.partial(jax.jit, static_argnames=("e", "interpret"))
def expert_matmul(
    x: jax.Array, experts: jax.Array, weight: jax.Array, *, e: int, interpret: "bool | pltpu.InterpretParams" = False
) -> jax.Array:
    """Multiply rows by the weights of the experts that they chose, with f32 accumulation and an f32 result.

    R is padded to 8, to 16, or to a multiple of 128, and within each of the three a row's result does not depend on R.

    Args:
      x: bfloat16 [R, C, K], or [R, 1, K] where all of a row's experts are given the same.
      experts: int32 [R, C], -1 for none, whose result is not defined.
      weight: bfloat16 [E * N, K].
      e: E.
      interpret: run by an interpreter, on any platform.

    Returns:
      f32 [R, C, N].
    """
    run = functools.partial(_matmul, e=e, interpret=interpret)
    return chunk_by_chunk(run, x, experts, {"weight": weight}, WIDE)


def _matmul(x, experts, arrays, e, interpret):
    weight, (rows, chosen) = arrays["weight"], experts.shape
    n, k = weight.shape[0] // e, weight.shape[1]
    filled = WIDE if rows > ROWS[-1] else next(each for each in ROWS if rows <= each)
    x = jnp.swapaxes(jnp.pad(x, ((0, filled - rows), (0, 0), (0, 0))), 0, 1)
    its = jnp.pad(experts, ((0, filled - rows), (0, 0)), constant_values=-1).T[:, :, None]
    order, count = hits(experts, e)
    block = tpu_rows(n, k)
    blocks = n // block
    if not interpret:
        weight = left_in_hbm(weight)
    y = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, count),
            in_specs=[
                pl.BlockSpec(x.shape, lambda j, i, order: (0, 0, 0)),
                pl.BlockSpec(its.shape, lambda j, i, order: (0, 0, 0)),
                pl.BlockSpec((block, k), lambda j, i, order: (order[i] * blocks + j, 0)),
            ],
            out_specs=pl.BlockSpec((None, chosen, filled, block), lambda j, i, order: (j, 0, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((blocks, chosen, filled, block), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY),
        cost_estimate=pl.CostEstimate(
            flops=2 * filled * min(e, chosen) * k * n, bytes_accessed=2 * min(e, chosen) * k * n, transcendentals=0
        ),
        interpret=interpret,
        name="experts",
    )(order, x, its, weight)
    return jnp.transpose(y, (2, 1, 0, 3)).reshape(filled, chosen, n)[:rows]


def _kernel(order_ref, x_ref, experts_ref, weight_ref, out_ref):
    i = pl.program_id(1)

    @pl.when(i == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    its = [experts_ref[c] == order_ref[i] for c in range(out_ref.shape[0])]  # bool [R, 1]
    x = x_ref[0]
    if x_ref.shape[0] > 1:
        x = functools.reduce(jnp.add, [jnp.where(mask, x_ref[c], 0) for c, mask in enumerate(its)])
    contracted = (((1,), (1,)), ((), ()))
    total = jax.lax.dot_general(x, weight_ref[...], contracted, preferred_element_type=jnp.float32)
    for c, mask in enumerate(its):
        out_ref[c] += jnp.where(mask, total, 0)


def why_not(chip: str, dtype: str, n: int, k: int, along_n: int, along_k: int) -> str | None:
    """Return why this kernel cannot be had, as the end of a sentence; n is of one expert."""
    if chip not in PALLAS_TPUS:
        return "needs a TPU v5e, v5p, v6e or 7x; on another TPU use 'dot'"
    if k > MOST_K or k % 128 or tpu_rows(n, k) == 0:  # XLA stores other sizes of K with N last, and would copy all of it
        return f"takes K in whole 128s up to {MOST_K} and N in whole 16s; use 'dot'"
    return None if dtype == "bfloat16" else "takes bfloat16 alone; use 'dot'"


def _by_experts(x, experts, arrays, *, e, n, chip, format, interpret):
    weight = arrays["weight"]
    return expert_matmul(x.astype(weight.dtype), experts, weight, e=e, interpret=interpret)


EXPERTS = Product("tpu experts", (PLAIN,), why_not, as_stored, DOT.axes, DOT.run, row_multiple, _by_experts)
