"""The TPU kernels on the TPU simulator, their decoding and their sizes; `test_products` has them interpreted, as all others."""

import jax
import jax.numpy as jnp
import mx_weights
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import honours_subnormals, tpu
from pallas_kernels.blocks import TPU_TILES, tpu_block_n, tpu_tile

# N, K, M and tiles: no multiple of a block, all three paths.
SIZES = [(1, 32, 1, 1), (200, 288, 3, 1), (130, 512, 11, 2), (257, 96, 40, 1), (31, 768, 17, 3)]
SIMULATOR = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager", uninitialized_memory="nan")
RACE = "RACE DETECTED"  # what the simulator prints or raises


def product(x, packed, scales, tiles=1, **options):
    options = {"interpret": True, "n": len(packed)} | options
    return np.asarray(tpu.mxfp4_matmul(x, **tpu.arrange(packed, scales, along_k=tiles), **options))


@pytest.mark.parametrize(("n", "k", "m", "tiles"), [SIZES[0], *(pytest.param(*size, marks=pytest.mark.slow) for size in SIZES[1:])])
def test_on_the_simulator(n, k, m, tiles, capfd):
    """With copies made as soon as they are asked for, memory full of NaN, and no two accesses that race."""
    x, packed, scales = mx_weights.random(n, k, m)
    mx_weights.assert_product(product(x, packed, scales, tiles, interpret=SIMULATOR), x, packed, scales)
    assert RACE not in "".join(capfd.readouterr())


def test_the_simulator_sees_a_race(capfd):
    def kernel(x_ref, out_ref, copied_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, copied_ref, semaphore)
        copy.start()
        out_ref[...] = copied_ref[...]
        copy.wait()

    scratch = [pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA]
    x = jnp.ones((8, 128))
    raised = ""
    try:
        pl.pallas_call(kernel, out_shape=x, scratch_shapes=scratch, interpret=SIMULATOR)(x).block_until_ready()
    except jax.errors.JaxRuntimeError as error:  # from jax 0.12 on
        raised = str(error)
    assert RACE in raised + "".join(capfd.readouterr())


def test_shapes_that_do_not_belong_together_are_refused():
    x, packed, scales = mx_weights.random(8, 64, 2)
    codes, factors = tpu.arrange(packed, scales).values()
    for wrong in ((x[:, :0], codes, factors), (jnp.tile(x, (1, 5)), codes, factors), (x, codes, factors[:, :1])):
        with pytest.raises(ValueError, match=r"does not belong to codes \[1, 128, 128\]"):
            tpu.mxfp4_matmul(*wrong, n=8, interpret=True)
    with pytest.raises(ValueError, match=r"N being 129 filled up"):
        tpu.mxfp4_matmul(x, codes, factors, n=129, interpret=True)


def test_the_probe_tells_a_matrix_unit_that_flushes_subnormals():
    def run(flush):
        def product(x, codes, scales):
            if not flush:
                return tpu.mxfp4_matmul(x, codes, scales, n=16, interpret=True)
            # What a unit without subnormals would see: codes 1 and 9 as zero.
            first, second = codes >> 4 & 7, codes >> 1 & 7
            flushed = jnp.where(first == 1, codes & 0x8F, codes)
            return tpu.mxfp4_matmul(x, jnp.where(second == 1, flushed & 0xF1, flushed), scales, n=16, interpret=True)

        return product

    assert honours_subnormals(run(flush=False))
    assert not honours_subnormals(run(flush=True))


def test_the_other_decoding_makes_no_subnormal_number():
    packed, scales = mx_weights.every_code_at_every_scale()
    words = jax.lax.bitcast_convert_type(tpu.arrange(packed, scales)["codes"].reshape(-1, 4), jnp.int32)
    for half in (words >> 3 & tpu.each_byte(0x0E) | words << 7 & tpu.each_byte(0x80), words & tpu.each_byte(0x8E)):
        bits = np.asarray(tpu._normal(half)).view(np.uint8)
        assert np.all((bits & 0x7C > 0) | (bits & 0x7F == 0))


@pytest.mark.parametrize("k", [32, 896, 2048, 2080, 3584, 4736, 14336, 18944, 28672])
def test_tiles_waste_little(k):
    tile = tpu_tile(k)
    assert tile % 256 == 0
    assert tile <= TPU_TILES[0]
    assert -k % tile < max(512, k // 12)


def test_blocks_leave_steps_to_overlap():
    for n, tiles in ((1024, 2), (4096, 7), (128256, 2)):
        block = tpu_block_n(n, tiles)
        assert block % 128 == 0
        assert -(-n // block) * tiles >= 8
    assert tpu_block_n(3, 1) == 128
