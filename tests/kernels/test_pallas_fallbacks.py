"""The XLA forms for chips without Pallas, against the definition and float64; on CPU, so in other rounding only."""

import jax
import jax.numpy as jnp
import mx_weights
import numpy as np
import pytest

from pallas_kernels import fallbacks


def grouped(x, packed, scales):
    return np.asarray(jax.jit(fallbacks.grouped_matmul)(x, *fallbacks.lay_out_groups(packed, scales)))


def reduced(x, packed, scales):
    return np.asarray(jax.jit(fallbacks.reduced_matmul)(x, packed, scales))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("n", "k", "m"), [(1, 32, 1), (50, 288, 3)])
@pytest.mark.parametrize("product", [grouped, reduced])
def test_odd_sizes(product, n, k, m, dtype):
    x, packed, scales = mx_weights.random(n, k, m, dtype)
    mx_weights.assert_product(product(x, packed, scales), x, packed, scales)


def test_many_rows():
    x, packed, scales = mx_weights.random(50, 288, 40)
    mx_weights.assert_product(grouped(x, packed, scales), x, packed, scales)


@pytest.mark.parametrize("product", [grouped, reduced])
def test_every_code_at_every_scale(product):
    packed, scales = mx_weights.every_code_at_every_scale()
    mx_weights.assert_exact_elements(product(mx_weights.ones(16, packed), packed, scales), packed, scales, 2.0**-124)


@pytest.mark.parametrize("product", [grouped, reduced])
def test_nan_and_infinity_stay_in_their_row(product):
    mx_weights.assert_not_finite_rows(product, 4)
