"""The C++ products: the definition in every instruction set of this machine, rows that depend on nothing else, threads."""

import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from windows import assert_rows_in_use

import cpu_kernels
from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import mxfp4_matmul as exact_mxfp4

ROOT = pathlib.Path(__file__).resolve().parents[2]
BF16, MXFP4 = cpu_kernels.isas("matmul"), cpu_kernels.isas("mxfp4_matmul")

pytestmark = pytest.mark.skipif(not BF16, reason="needs a C++ compiler")

# Outputs and contracted lengths around the tiles' and groups' sizes, whole or not; the first of each are taken with every M.
SIZES = [(13, 544), (1, 32), (3, 96), (50, 2080)]
ODD_SIZES = [(29, 33), (5, 1), (14, 31), (7, 513)]


def rows(n):
    """Numbers of rows to compare with the first of 67: all up to 20 for the first sizes, some for the others."""
    return range(1, 21) if n in (13, 29) else (1, 3, 8, 17)


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.RandomState(seed).standard_normal(shape)).astype(ml_dtypes.bfloat16)


def bf16(x, w, isa=None, used=None):
    return np.asarray(cpu_kernels.dense_matmul(jnp.asarray(x), jnp.asarray(w), isa, used))


def mxfp4(x, leaf, isa=None, used=None):
    return np.asarray(cpu_kernels.mxfp4_matmul(jnp.asarray(x), leaf.arrays["codes"], leaf.arrays["scales"], isa, used))


def product(x, w):
    return x.astype(np.float64) @ w.astype(np.float64).T


def rounded(x):
    """The definition of eight-bit activations: (integers [M, K/32, 32], the factor of each block)."""
    blocks = np.asarray(x, np.float32).reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(-1)
    largest = np.where(largest < 2.0**-120, 0, largest).astype(np.float32)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(blocks * inverse[..., None]).astype(np.float64), (largest / np.float32(254)).astype(np.float64)


def definition(x, leaf):
    """Y by the definition, in float64, and the sum of the magnitudes of its terms."""
    q, factor = rounded(x)
    packed, scales = np.asarray(leaf.arrays["codes"]), np.asarray(leaf.arrays["scales"]).astype(np.int64)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1, 32)
    values = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float64)[codes & 7] * np.where(codes & 8, -1, 1)
    scale = np.where(scales == 0, 0.0, np.exp2(scales - 127.0))
    terms = np.einsum("mbk,nbk->mnb", q, values) * factor[:, None] * scale
    return terms.sum(-1), np.abs(terms).sum(-1)


def assert_is_definition(y, x, leaf):
    expected, magnitude = definition(x, leaf)
    assert np.all(np.abs(y - expected) <= 2.0**-21 * magnitude + 1e-37)


@pytest.mark.parametrize("isa", BF16)
@pytest.mark.parametrize(("n", "k"), SIZES + ODD_SIZES)
def test_bf16_is_the_product_and_rows_depend_on_nothing_else(isa, n, k):
    x, w = normal(67, k), normal(n, k, seed=1, scale=k**-0.5)
    whole = bf16(x, w, isa)
    np.testing.assert_allclose(whole, product(x, w), rtol=1e-5, atol=2e-6)
    for m in rows(n):
        np.testing.assert_array_equal(bf16(x[:m], w, isa), whole[:m])
    np.testing.assert_array_equal(bf16(x[5:6], w, isa), whole[5:6])
    np.testing.assert_array_equal(bf16(x, w[n // 2 :], isa), whole[:, n // 2 :])  # another place in a tile
    if n in (13, 29):
        assert_rows_in_use(lambda x, used: bf16(x, w, isa, used), x, whole)


@pytest.mark.parametrize("isa", MXFP4)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_mxfp4_is_its_definition_and_rows_depend_on_nothing_else(isa, n, k):
    x, leaf = normal(67, k), quantize(jnp.asarray(normal(n, k, seed=1, scale=k**-0.5)))
    whole = mxfp4(x, leaf, isa)
    assert_is_definition(whole, x, leaf)
    for m in rows(n):
        np.testing.assert_array_equal(mxfp4(x[:m], leaf, isa), whole[:m])
    np.testing.assert_array_equal(mxfp4(x[5:6], leaf, isa), whole[5:6])
    if n == 13:
        assert_rows_in_use(lambda x, used: mxfp4(x, leaf, isa, used), x, whole)


@pytest.mark.parametrize("isa", MXFP4)
def test_mxfp4_is_near_the_exact_product(isa):
    """Each element of x moves by at most half a step of its block, a/254."""
    x, leaf = normal(5, 1120), quantize(jnp.asarray(normal(40, 1120, seed=1)))
    exact = np.asarray(exact_mxfp4(jnp.asarray(x, jnp.float32), leaf.arrays["codes"], leaf.arrays["scales"]), np.float64)
    _, factor = rounded(x)
    values = np.asarray(exact_mxfp4(jnp.eye(1120, dtype=jnp.float32), **leaf.arrays), np.float64).T  # [N, K]
    bound = np.einsum("mb,nbk->mn", factor, np.abs(values).reshape(40, -1, 32))
    assert np.all(np.abs(mxfp4(x, leaf, isa) - exact) <= 1.001 * bound + 1e-4)
    assert np.abs(mxfp4(x, leaf, isa) - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("isa", MXFP4)
def test_every_code_and_the_ends_of_the_scales(isa):
    codes = np.arange(16 * 32, dtype=np.uint8).reshape(16, 32) // 2 % 16
    packed = np.tile(codes[:, ::2] | codes[:, 1::2] << 4, (1, 3))  # [16, 48]: K is 96
    packed[3] = np.random.RandomState(0).randint(0, 256, 48)
    scales = np.random.RandomState(1).choice([0, 1, 2, 127, 251, 252], size=(16, 3)).astype(np.uint8)
    scales[0], scales[1] = 0, 252  # 252 is the largest that a finite weight can have
    leaf = QuantizedArray({"codes": jnp.asarray(packed), "scales": jnp.asarray(scales)}, (16, 96), "mxfp4")
    for scale in (1e-3, 1e-8):
        x = normal(4, 96, scale=scale)
        y = mxfp4(x, leaf, isa)
        assert_is_definition(y, x, leaf)
        assert not y[:, 0].any()  # a scale of 0 is one of zero, exactly
    np.testing.assert_array_equal(mxfp4(np.zeros((2, 96), ml_dtypes.bfloat16), leaf, isa), 0)


@pytest.mark.parametrize("isa", BF16)
@pytest.mark.parametrize("where", [0, 40, 69])
def test_bf16_passes_on_nan_and_infinity(isa, where):
    x, w = normal(6, 70), normal(9, 70, seed=1)
    w[0, where], w[1, where] = 0, 1
    clean = bf16(x, w, isa)
    x[1, where], x[2, where], x[4, where] = np.nan, np.inf, -np.inf
    y = bf16(x, w, isa)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(y[[1, 2, 4]], product(x, w)[[1, 2, 4]].astype(np.float32))
    np.testing.assert_array_equal(y[[0, 3, 5]], clean[[0, 3, 5]])


@pytest.mark.parametrize("isa", MXFP4)
@pytest.mark.parametrize("where", [0, 600, 1119])
def test_mxfp4_makes_nan_of_rows_with_nan_or_infinity(isa, where):
    x, leaf = normal(6, 1120), quantize(jnp.asarray(normal(9, 1120, seed=1)))
    clean = mxfp4(x, leaf, isa)
    x[1, where], x[2, where], x[4, where] = np.nan, np.inf, -np.inf
    y = mxfp4(x, leaf, isa)
    assert np.isnan(y[[1, 2, 4]]).all()
    np.testing.assert_array_equal(y[[0, 3, 5]], clean[[0, 3, 5]])


def test_empty_products():
    assert bf16(normal(0, 8), normal(3, 8)).shape == (0, 3)
    assert bf16(normal(2, 8), normal(0, 8)).shape == (2, 0)
    np.testing.assert_array_equal(bf16(normal(2, 0), normal(3, 0)), np.zeros((2, 3)))
    assert bf16(normal(0, 8), normal(3, 8), used=jnp.zeros((0,), jnp.int32)).shape == (0, 3)
    np.testing.assert_array_equal(bf16(normal(4, 0), normal(3, 0), used=jnp.array([1, 1], jnp.int32))[::2], np.zeros((2, 3)))


def test_a_named_instruction_set_runs_or_raises():
    x, leaf = normal(2, 32), quantize(jnp.ones((3, 32)))
    with pytest.raises(NotImplementedError, match=r"matmul for amx: this machine has .*portable"):
        bf16(x, normal(3, 32), "amx")
    with pytest.raises(NotImplementedError, match="mxfp4_matmul for avx512bf16"):
        mxfp4(x, leaf, "avx512bf16")


def test_what_does_not_belong_together_is_refused():
    x, leaf = jnp.ones((2, 64), jnp.bfloat16), quantize(jnp.ones((3, 64)))
    with pytest.raises(ValueError, match="of one of bfloat16, float16, float32"):
        cpu_kernels.dense_matmul(x, jnp.ones((3, 64)))
    for used in (jnp.ones((2,)), jnp.ones((), jnp.int32), jnp.ones((3,), jnp.int32), jnp.ones((0,), jnp.int32)):
        with pytest.raises(ValueError, match=r"should be int32 \[B\] for 2 rows, B windows of equal size"):
            cpu_kernels.dense_matmul(x, x, used=used)
    with pytest.raises(ValueError, match=r"should be \[M, K\] and \[K\]"):
        cpu_kernels.rms_norm(x, jnp.ones((32,), jnp.bfloat16), 1e-5)
    with pytest.raises(ValueError, match=r"\[M, K\] and \[N, K\]"):
        cpu_kernels.dense_matmul(x, jnp.ones((3, 32), jnp.bfloat16))
    with pytest.raises(ValueError, match="do not belong together"):
        cpu_kernels.mxfp4_matmul(x[:, :32], leaf.arrays["codes"], leaf.arrays["scales"])
    with pytest.raises(ValueError, match="should be bfloat16, uint8, uint8"):
        cpu_kernels.mxfp4_matmul(x.astype(jnp.float32), leaf.arrays["codes"], leaf.arrays["scales"])


def test_gradients_are_those_of_the_plain_product():
    x, w = jnp.asarray(normal(3, 40)), jnp.asarray(normal(5, 40, seed=1))

    def gradients(f):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), argnums=(0, 1))(x, w)

    def plain(x, w):
        return jnp.dot(x, w.T, preferred_element_type=jnp.float32)

    def of_first_rows(x, w):
        return cpu_kernels.dense_matmul(x, w, used=jnp.full((1,), 2, jnp.int32))[:2]

    for ours, theirs in ((cpu_kernels.dense_matmul, plain), (of_first_rows, lambda x, w: plain(x[:2], w))):
        for found, expected in zip(gradients(ours), gradients(theirs), strict=True):
            np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=0.02, atol=0.02)


def test_rows_in_use_are_mapped_over_and_exported():
    x, w = jnp.asarray(normal(12, 40)), jnp.asarray(normal(5, 40, seed=1))
    whole = np.asarray(cpu_kernels.dense_matmul(x, w))
    used = jnp.array([[3, 1], [0, 2]], jnp.int32)

    def run(x, used):
        return cpu_kernels.dense_matmul(x, w, used=used)

    found = jax.jit(jax.vmap(run))(x.reshape(2, 6, 40), used)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mlspecqd_matmul_bfloat16")]
    exported = jax.export.export(jax.jit(run), disabled_checks=checks)(x, used.ravel())
    for result in (found.reshape(12, 5), exported.call(x, used.ravel())):
        for row in (0, 1, 2, 3, 9, 10):
            np.testing.assert_array_equal(result[row], whole[row])


def test_calls_from_two_threads_at_once():
    """Large enough to be shared with the pool, in many calls that overlap."""
    x, w = jnp.asarray(normal(3, 512)), jnp.asarray(normal(700, 512, seed=1))
    leaf = quantize(w)

    @jax.jit
    def both(x):
        return cpu_kernels.dense_matmul(x, w), cpu_kernels.mxfp4_matmul(x, leaf.arrays["codes"], leaf.arrays["scales"])

    expected = [np.asarray(y) for y in both(x)]
    wrong = []

    def repeat():
        for _ in range(200):
            if not all(np.array_equal(*pair) for pair in zip(both(x), expected, strict=True)):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=repeat) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


# Prints a digest of products that are shared with the pool; argument: the cores to run on.
DIGEST = """
import hashlib, os, sys
os.sched_setaffinity(0, range(int(sys.argv[1])))
import jax, jax.numpy as jnp, numpy as np
import cpu_kernels
from mlspecqd_jax.weights.cast import quantize

random = np.random.RandomState(0)
w = jnp.asarray(random.standard_normal((1500, 416)), jnp.bfloat16)
leaf, six, fine, digest = quantize(w), quantize(w, "mxfp6_e3m2"), quantize(w, "mxfp8_e4m3"), hashlib.sha256()
for m in (1, 5, 64):
    x = jnp.asarray(random.standard_normal((m, 416)), jnp.bfloat16)
    for isa in cpu_kernels.isas("matmul"):
        digest.update(np.asarray(cpu_kernels.dense_matmul(x, w, isa)).tobytes())
    for isa in cpu_kernels.isas("mxfp4_matmul"):
        digest.update(np.asarray(cpu_kernels.mxfp4_matmul(x, leaf.arrays["codes"], leaf.arrays["scales"], isa)).tobytes())
    for isa in cpu_kernels.isas("mxfp6_matmul"):
        digest.update(np.asarray(cpu_kernels.mxfp6_matmul(x, six.arrays["codes"], six.arrays["scales"], 3, isa)).tobytes())
    for isa in cpu_kernels.isas("mx8_matmul"):
        digest.update(np.asarray(cpu_kernels.mx8_matmul(x, fine.arrays["codes"], fine.arrays["scales"], 4, 3, isa)).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_any_number_of_threads_gives_the_same_bits():
    """On one core there is no helper at all, and nothing waits for one."""
    cores = sorted({1, min(2, len(os.sched_getaffinity(0)))})
    found = {
        subprocess.run(
            [sys.executable, "-c", DIGEST, str(n)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
        ).stdout
        for n in cores
    }
    assert len(found) == 1
