"""Every format split over two host devices, by outputs and by inputs: the same product, and no group in two parts."""

import os
import subprocess
import sys

import pytest
from compiling import quick_flags

pytestmark = pytest.mark.slow

# The number of devices is fixed when jax starts. 576 inputs are no whole groups of 128, and 200 outputs no whole blocks of them.
SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.formats import FORMATS, format_of
from mlspecqd_jax.weights.placement import usable_mesh
from mlspecqd_jax.weights.products import multiply, multiply_experts
from mlspecqd_jax.weights.quantization import place_quantized
from mlspecqd_jax.weights.tensors import Tensor

mesh = usable_mesh(jax.make_mesh((2,), ("model",)))
assert mesh.size == 2
for n, k in ((256, 512), (200, 576)):
    w = (jax.random.normal(jax.random.key(0), (n, k)) * 0.02).astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (3, k)).astype(jnp.bfloat16)
    for name in (*FORMATS, "int8_g64"):
        leaf, f = quantize(w, name), format_of(name)
        exact = np.asarray(x, np.float64) @ np.asarray(dequantize(leaf, jnp.float32), np.float64).T
        for axes in (("model", None), (None, "model")):
            placed = place_quantized(Tensor((n, k), axes, True, ()), leaf, mesh, jnp.bfloat16)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                found = np.asarray(jax.jit(multiply)(x, placed))
            assert np.abs(found - exact).max() < 5e-3 * np.abs(exact).max(), (name, axes)
            if axes[1] and n == 256:  # the halves of the rows as two experts' weights
                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                    chosen = jax.jit(multiply_experts, static_argnums=3)(x[:, None], placed, jnp.array([[1], [0], [1]]), 2)
                expected = exact.reshape(3, 2, -1)[(0, 1, 2), (1, 0, 1)]
                assert np.abs(np.asarray(chosen)[:, 0] - expected).max() < 5e-3 * np.abs(exact).max(), name
            whole = k % (2 * (f.group or 2 * k)) if axes[1] else n % (2 * f.rows)
            assert (tuple(placed.spec) == axes) == (not whole), (name, axes, placed.spec)
print("right")
"""


def test_products_of_split_weights_are_those_of_whole_ones():
    environment = os.environ | quick_flags("--xla_force_host_platform_device_count=2") | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600)
    assert process.stdout == "right\n", process.stderr
