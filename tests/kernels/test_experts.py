"""Products with experts' weights: each row by its own expert's, and of the others' weights not one is read or widened."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import loop_lines, operations, widened

import cpu_kernels
from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.products import multiply, multiply_experts
from mlspecqd_jax.weights.quantized_array import QuantizedArray, probe, watch
from pallas_kernels import experts, hit_by_hit, xla

E, N, K = 5, 24, 96
CHOSEN = jnp.asarray([[3, 0], [1, -1], [-1, -1], [4, 3], [0, 3], [3, 1]], jnp.int32)  # expert 2 by nobody
MORE = ("mxfp6_e2m3", "mxfp8_e4m3", "nvfp4", "int4", "uint4_g32", "int8")
IN_CPP = bool(cpu_kernels.isas("matmul"))
run = jax.jit(multiply_experts, static_argnums=3)


def normal(*shape, dtype="bfloat16"):
    return jnp.asarray(np.random.RandomState(sum(shape)).standard_normal(shape), dtype)


def leaves(format, dtype):
    """Return (the leaf of all experts, a function to one expert's)."""
    w = normal(E * N, K, dtype=dtype)
    if format is None:
        return w, lambda e: w[e * N : (e + 1) * N]
    leaf = quantize(w, format)

    def alone(e):
        arrays = {role: array if role == "tensor_scale" else array[e * N : (e + 1) * N] for role, array in leaf.arrays.items()}
        return QuantizedArray(arrays, (N, K), format)

    return leaf, alone


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        (None, "bfloat16"),
        ("mxfp4", "bfloat16"),
        ("fp8_e4m3", "bfloat16"),
        *(pytest.param(None, dtype, marks=pytest.mark.slow) for dtype in ("float16", "float32")),
        *(pytest.param(format, "bfloat16", marks=pytest.mark.slow) for format in MORE),
        pytest.param("mxfp4", "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("each", [1, 2])
def test_a_row_is_multiplied_by_its_expert_s_weight(format, dtype, each):
    leaf, alone = leaves(format, dtype)
    x = normal(len(CHOSEN), each, K, dtype=dtype)
    found = np.asarray(run(x, leaf, CHOSEN, E))
    assert (found.shape, found.dtype) == ((*CHOSEN.shape, N), np.float32)
    for (t, c), e in np.ndenumerate(np.asarray(CHOSEN)):
        if e >= 0:
            expected = multiply(x[t, min(c, each - 1)][None], alone(int(e)))[0]
            if IN_CPP:
                np.testing.assert_array_equal(found[t, c], expected, err_msg=f"{t}, {c}")
            else:
                np.testing.assert_allclose(found[t, c], expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("format", [None, "fp8_e4m3", "mxfp4"])
def test_what_nobody_chose_is_not_read(format):
    """Of an expert that no row chose, all numbers may be none; and rows without an expert may be none too."""
    leaf, _ = leaves(format, "bfloat16")
    x = normal(len(CHOSEN), 2, K)
    whole = np.asarray(run(x, leaf, CHOSEN, E))
    nan = {"bfloat16": jnp.nan, "float32": jnp.nan, "uint8": 255}

    def spoilt(array):
        return array.at[2 * N : 3 * N].set(nan[array.dtype.name])

    other = spoilt(leaf) if format is None else dataclasses.replace(leaf, arrays=jax.tree.map(spoilt, leaf.arrays))
    found = np.asarray(run(jnp.where(CHOSEN[..., None] >= 0, x, jnp.nan), other, CHOSEN, E))
    np.testing.assert_array_equal(found[CHOSEN >= 0], whole[CHOSEN >= 0])


def test_the_loop_goes_around_once_for_each_expert_that_was_hit():
    x, w = normal(len(CHOSEN), 2, K, dtype="float32"), normal(E * N, K, dtype="float32")
    rounds = []

    def product(x, arrays):
        jax.debug.callback(lambda first: rounds.append(float(first)), arrays["weight"][0, 0])
        return x @ arrays["weight"].T

    found = hit_by_hit(x, CHOSEN, {"weight": w}, product, E, N)
    jax.block_until_ready(found)
    assert sorted(rounds) == sorted(float(w[e * N, 0]) for e in (0, 1, 3, 4))
    np.testing.assert_allclose(found[3, 1], x[3, 1] @ w[3 * N : 4 * N].T, rtol=1e-5, atol=1e-5)
    assert (found[2] == 0).all()
    assert (hit_by_hit(x, jnp.full_like(CHOSEN, -1), {"weight": w}, product, E, N) == 0).all()


def in_a_loop(part):
    """HLO of products with the experts that were hit, some of whose weights `part` takes."""

    def product(x, w, chosen):
        run = lambda x, arrays: xla.matmul(x, arrays["weight"])  # noqa: E731
        step = experts._step(x, chosen, {"weight": w}, run, E, part)
        return jax.lax.fori_loop(0, jnp.max(chosen), step, jnp.zeros((*chosen.shape, N)))

    return jax.jit(product).lower(normal(6, 1, K), normal(E * N, K), CHOSEN).compile().as_text()


def test_a_part_widens_no_stack():
    hlo = in_a_loop(xla.part)
    assert not widened(hlo, {(E * N, K)})
    assert not [found for found in operations(loop_lines(hlo)) if found[0] == "copy" and found[2] == (E * N, K)]


def test_a_part_of_the_floats_still_widens_the_stack():
    """Where this fails, XLA:CPU has learnt it, and `xla.part` can take the floats themselves from that version on."""
    assert widened(in_a_loop(xla.plain_part), {(E * N, K)})


@pytest.mark.parametrize("each", [1, 2])
def test_the_derivative_is_that_of_all_experts(each):
    x, w = normal(len(CHOSEN), each, K, dtype="float32"), normal(E * N, K, dtype="float32")
    chosen, toward = CHOSEN.at[1:3].set(2), normal(*CHOSEN.shape, N, dtype="float32")

    def plain(x, w):
        each_expert = jnp.take(w.reshape(E, N, K), chosen, axis=0)
        return jnp.sum(jnp.einsum("tcnk,tck->tcn", each_expert, jnp.broadcast_to(x, (*chosen.shape, K))) * toward)

    chosen = jnp.asarray([[3, 0], [1, 2], [2, 4], [4, 3], [0, 3], [3, 1]], jnp.int32)
    found = jax.grad(lambda x, w: jnp.sum(multiply_experts(x, w, chosen, E) * toward), argnums=(0, 1))(x, w)
    for one, other in zip(found, jax.grad(plain, argnums=(0, 1))(x, w), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_leaves_that_measure():
    """A change of all experts' weights by an amount for each row, and the moments of what all of them are given."""
    x, w, change = normal(6, 2, K, dtype="float32"), normal(E * N, K, dtype="float32"), normal(E * N, K + 0, dtype="float32") / 8
    chosen = jnp.maximum(CHOSEN, 0)
    moved = jax.grad(lambda amount: jnp.sum(multiply_experts(x, probe(w, change, amount), chosen, E)))(jnp.zeros(6))
    np.testing.assert_allclose(moved, jnp.sum(multiply_experts(x, change, chosen, E), axis=(1, 2)), rtol=1e-4, atol=1e-4)
    counted = jnp.arange(6, dtype=jnp.float32)
    moments = jax.grad(lambda zeros: jnp.sum(multiply_experts(x, watch(w, zeros, counted), chosen, E)))(jnp.zeros((K, K)))
    np.testing.assert_allclose(moments, jnp.einsum("tck,tcl,t->kl", x, x, counted), rtol=1e-4, atol=1e-3)


def test_experts_that_do_not_belong_to_the_rows_are_an_error():
    if not IN_CPP:
        pytest.skip("needs a C++ compiler")
    with pytest.raises(ValueError, match=r"int32 \[3\], a number for each row"):
        cpu_kernels.dense_matmul(normal(3, K), normal(E * N, K), experts=jnp.zeros(2, jnp.int32), n=N)
    with pytest.raises(Exception, match="do not belong together"):
        cpu_kernels.dense_matmul(normal(3, K), normal(E * N, K), experts=jnp.zeros(3, jnp.int32), n=N - 1).block_until_ready()
