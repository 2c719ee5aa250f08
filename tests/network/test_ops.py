"""`linear` on plain and quantized weights: the float64 product of what is stored, at any size, and one decoded weight in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
from mlspecqd_jax.network.ops import linear, row_multiple
from mlspecqd_jax.weights import layouts
from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.formats import FORMATS, MX
from pallas_kernels import bf16_matmul, mx_matmul, mxfp4_matmul, xla

run = jax.jit(linear, static_argnames="out_dtype")


def weight(n, k, dtype=jnp.float32):
    return jnp.asarray(np.random.RandomState(n + k).standard_normal((n, k)) / np.sqrt(k), dtype)


def activations(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.RandomState(len(shape)).standard_normal(shape), dtype)


def rounds_activations(dtype):
    """Whether an MXFP4 product runs in C++ with activations in 8 bits; its own tests compare it with its definition."""
    return dtype == "bfloat16" and bool(cpu_kernels.isas("mxfp4_matmul"))


def product(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).T


@pytest.mark.parametrize(
    ("format", "shape", "n"),
    [("mxfp4", (1, 172), 51), ("mxfp4", (2, 1, 1), 3), *[(format, (3, 5, 70), 33) for format in (None, *FORMATS)]],
)
def test_odd_sizes(format, shape, n):
    x, w = activations(*shape), weight(n, shape[-1])
    leaf = w if format is None else quantize(w, format)
    y = run(x, leaf)
    assert y.shape == (*shape[:-1], n)
    np.testing.assert_allclose(y, product(x, w if format is None else dequantize(leaf, jnp.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_result_has_the_dtype_of_x(dtype, rows):
    x, leaf = activations(rows, 172, dtype=dtype), quantize(weight(51, 172))
    y, exact = run(x, leaf), product(x, dequantize(leaf, jnp.float32))
    assert y.dtype == dtype
    atol = 0.04 if rounds_activations(dtype) else 1e-5
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=atol)
    wide = run(x, leaf, out_dtype=jnp.float32)  # accumulated in f32 whatever x is
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("format", "dtype"), [("mxfp4", "float32"), *[(format.name, "bfloat16") for format in MX]])
def test_bit_for_bit_the_product_with_the_decoded_weight(format, dtype):
    """Of the definition, and of the form in which it runs in XLA."""
    x, leaf, f = activations(4, 96, dtype=dtype), quantize(weight(48, 96), format), FORMATS[format]
    product = jax.jit(bf16_matmul)(x, dequantize(leaf, jnp.dtype(dtype)))
    bits = (f.element.exponent_bits, f.element.mantissa_bits)
    np.testing.assert_array_equal(jax.jit(mx_matmul, static_argnums=(3, 4))(x, *leaf.arrays.values(), *bits), product)
    np.testing.assert_array_equal(jax.jit(xla.decoded_matmul, static_argnums=2)(x, leaf.arrays, f), product)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "format"),
    [("bfloat16", "mxfp4"), ("float32", "mxfp4"), ("float32", "mxfp8_e4m3"), ("bfloat16", "uint4_g32"), ("bfloat16", "int8")],
)
def test_a_loop_holds_one_decoded_weight(rows, dtype, format):
    """Neither hoisted out of the loop nor all decoded at the start of a pass."""
    size, layers = 512, 4

    def loop(x, weights):
        def body(carry):
            i, x = carry
            for w in weights:
                x = jnp.tanh(linear(x, w))
            return i + 1, x

        return jax.lax.while_loop(lambda carry: carry[0] < 5, body, (0, x))[1]

    weights = [quantize(weight(size, size), format) for _ in range(layers)]
    compiled = jax.jit(loop).lower(activations(rows, size, dtype=dtype), weights).compile()
    one = size * size * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * one


@pytest.mark.parametrize(
    ("x", "codes", "scales"),
    [((2, 64), (3, 32), (3, 1)), ((2, 32), (3, 32), (3, 1)), ((2, 32), (4, 16), (3, 1)), ((32,), (3, 16), (3, 1))],
)
def test_shapes_that_do_not_belong_together_are_refused(x, codes, scales):
    with pytest.raises(ValueError, match=r"do not belong together; give x \[M, K\], codes \[N, K/2\]"):
        mxfp4_matmul(jnp.ones(x), jnp.ones(codes, jnp.uint8), jnp.ones(scales, jnp.uint8))


def test_other_formats_have_one_code_a_byte():
    with pytest.raises(ValueError, match=r"codes \[N, K\]"):
        mx_matmul(jnp.ones((2, 32)), jnp.ones((3, 16), jnp.uint8), jnp.ones((3, 1), jnp.uint8), 4, 3)


@pytest.mark.skipif(not cpu_kernels.isas("matmul"), reason="needs a C++ compiler")
def test_one_device_runs_the_kernels_and_a_mesh_does_not():
    """A foreign call on a split weight would gather it; without a compiler the plain product takes its place."""
    x, w = activations(3, 64, dtype=jnp.bfloat16), weight(32, 64, jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("model",))
    for leaf, name in ((w, "mlspecqd_matmul_bfloat16"), (quantize(w), "mlspecqd_mxfp4_matmul")):
        lower = jax.jit(lambda x, leaf: linear(x, leaf)).lower
        assert name in lower(x, leaf).as_text()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            assert "mlspecqd_" not in lower(x, leaf).as_text()
        assert "mlspecqd_" not in jax.jit(linear).trace(x, leaf).lower(lowering_platforms=("tpu",)).as_text()
    for dtype in ("float16", "float32"):
        assert f"mlspecqd_matmul_{dtype}" in jax.jit(linear).lower(x.astype(dtype), w.astype(dtype)).as_text()


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_rows_at_whose_multiples_a_row_is_alike(format):
    """Told of what runs: C++ by itself; XLA on CPU in bfloat16 alone, from two rows on; elsewhere one padded width."""
    mesh, in_cpp = jax.make_mesh((1,), ("model",)), cpu_kernels.usable()
    for dtype in ("bfloat16", "float16", "float32"):
        w = weight(48, 96, dtype)
        leaf = w if format is None else quantize(w, format)
        in_xla = 2 if dtype == "bfloat16" else None
        assert row_multiple([leaf], dtype, "cpu") == (1 if in_cpp else in_xla)
        assert row_multiple([leaf], dtype, "cpu", mesh) == in_xla
        for chip in ("gpu", "sm_90", "tpu", "TPU v5 lite"):
            assert row_multiple([leaf], dtype, chip) == row_multiple([leaf], dtype, chip, mesh) == 16


def test_a_plain_weight_is_multiplied_in_its_own_dtype_and_an_arranged_one_by_its_product():
    mesh = jax.make_mesh((1,), ("model",))
    assert row_multiple([weight(48, 96)], "bfloat16", "cpu", mesh) is None
    arranged = layouts.arrange(quantize(weight(48, 96)), "gpu", "sm_90", dtype="bfloat16")
    assert row_multiple([arranged], "bfloat16", "sm_90") == 16
