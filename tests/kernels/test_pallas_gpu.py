"""The GPU kernel's PTX by the few instructions that it is made of, and its sizes; `test_products` has it interpreted, as others."""

import re

import jax.numpy as jnp
import mx_weights
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.blocks import GPU_CHUNKS, gpu_blocks


def product(x, packed, scales):
    return np.asarray(gpu.mxfp4_matmul(x, **gpu.arrange(packed, scales), n=packed.shape[0], interpret=True))


def pair_values(register):
    """The two bfloat16 of uint32 registers, as float64 [..., 2]."""
    return register.view(jnp.bfloat16).reshape(*register.shape, 2).astype(np.float64)


def evaluate(ptx, *words):
    """Run PTX on numpy uint32, $1, $2, ... in this order; return the pairs $0 as float64 [..., 2]."""
    registers = {f"${i + 1}": word for i, word in enumerate(words)}
    for line in ptx.strip().strip("{}").split(";"):
        match = re.fullmatch(r"\s*([\w.]+) (.*)", line)
        if not match or match[1] == ".reg":
            continue
        to, *operands = (operand.strip() for operand in match[2].split(","))
        a, *rest = (registers[o] if o in registers else np.uint32(int(o, 0)) for o in operands)
        if match[1] == "lop3.b32":
            b, c, table = rest
            bits = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32)]
            registers[to] = sum((table >> bit & 1) << np.uint32(i) for i, bit in enumerate(bits)).astype(np.uint32)
        elif match[1] == "mov.b32":
            registers[to] = np.full_like(words[0], a)
        elif match[1] == "fma.rn.bf16x2":
            b, c = rest
            assert np.all(pair_values(c) == 0)
            registers[to] = pair_values(a) * pair_values(b)
        else:
            run = {"shl.b32": np.left_shift, "shr.b32": np.right_shift, "and.b32": np.bitwise_and}[match[1]]
            registers[to] = run(a, rest[0]).astype(np.uint32)
    return registers["$0"]


def codes_and_their_words():
    """Return (codes [16, 128], their words [16, 16]): every code at every place."""
    codes = (np.arange(16)[:, None] + 7 * np.arange(gpu.CHUNK)) % 16
    packed = np.pad(codes[:, ::2] | codes[:, 1::2] << 4, ((0, 48), (0, 0))).astype(np.uint8)
    words = gpu.arrange(jnp.asarray(packed), jnp.full((64, 4), 127, jnp.uint8))["words"]
    return codes, np.asarray(words)[0, :16].view(np.uint32)


@pytest.mark.parametrize("step", range(gpu.STEPS))
def test_ptx_decodes_every_code(step):
    """Both halves of the result, at its place in the chunk, whatever the other codes of the two words are."""
    codes, words = codes_and_their_words()
    factor = np.full((16, 8), np.float32(2.0**gpu.BIAS).view(np.uint32) >> 16) * np.uint32(0x10001)
    found = evaluate(gpu.pairs_ptx(step), words[:, ::2], words[:, 1::2], factor).reshape(16, 16)
    np.testing.assert_array_equal(found, mx_weights.VALUES[codes[:, 16 * step : 16 * step + 16]])


@pytest.mark.parametrize("step", range(gpu.STEPS))
def test_the_interpreter_decodes_as_the_ptx_does(step):
    _, words = codes_and_their_words()
    exponent = np.uint32([[250], [127 + gpu.BIAS]]).repeat(8, axis=0)
    factor = np.broadcast_to((exponent << 7) * np.uint32(0x10001), (16, 8)).copy()
    pairs = evaluate(gpu.pairs_ptx(step), words[:, ::2], words[:, 1::2], factor).reshape(16, 16)
    found = gpu._pairs(jnp.asarray(words.view(np.int32)), jnp.asarray(exponent.view(np.int32)), step)
    np.testing.assert_array_equal(np.asarray(found, np.float64), pairs)


@pytest.mark.parametrize("exponent", [*(pytest.param(e, marks=pytest.mark.slow) for e in (-100, 0)), 100])
def test_rows_of_any_size(exponent):
    """Nothing of x leaves its range, and a row of zeros stays zero."""
    x, packed, scales = mx_weights.random(33, 96, 3)
    x = (x * 2.0**exponent).at[2].set(0)
    found = product(x, packed, scales)
    assert np.all(np.isfinite(found))
    mx_weights.assert_product(found, x, packed, scales)


def test_shapes_that_do_not_belong_together_are_refused():
    x, packed, scales = mx_weights.random(8, 64, 2)
    words, factors, power = gpu.arrange(packed, scales).values()
    for wrong in ((x[:, :0], words, factors, 8), (x, words[:, :8], factors, 8), (x, words, factors, 80)):
        with pytest.raises(ValueError, match=r"does not belong to words \[1, \d+, 16\]"):
            gpu.mxfp4_matmul(*wrong[:3], power, n=wrong[3], interpret=True)


@pytest.mark.parametrize("chip", ["sm_80", "sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize(("n", "chunks"), [(1024, 32), (4096, 112), (128256, 32), (64, 1)])
def test_k_is_split_where_outputs_are_few(chip, n, chunks):
    block, splits, _, _ = gpu_blocks(chip, n, chunks)
    assert gpu.OUTPUTS % block == 0
    assert splits == 1 or chunks // splits >= GPU_CHUNKS
    assert (n, splits) != (1024, 1)


@pytest.mark.parametrize(
    ("n", "k", "blocks"),
    [(4096, 4096, (64, 8)), (1024, 4096, (64, 16)), (14336, 4096, (64, 4)), (4096, 14336, (64, 8)), (576, 1536, (16, 4))],
)
def test_blocks_are_those_that_were_fastest_on_an_h200(n, k, blocks):
    assert gpu_blocks("sm_90", n, k // gpu.CHUNK)[:2] == blocks
