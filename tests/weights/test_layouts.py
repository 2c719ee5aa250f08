"""Weights laid out for a chip: which product is chosen, what is refused, `linear` on them, and splitting them over devices."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import mx_weights
import numpy as np
import pytest

from mlspecqd_jax.network.matmul import implementation, linear
from mlspecqd_jax.weights import layouts
from mlspecqd_jax.weights.mx import MXFP4Array, quantize
from mlspecqd_jax.weights.quantization import quantize_params
from mlspecqd_jax.weights.tensors import Tensor
from pallas_kernels import LAYOUTS, chip_of, choose, laid_out_matmul, lay_out, unsupported

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHIPS = {"tpu": "TPU v5 lite", "tpu without subnormals": "TPU v5 lite", "gpu": "sm_90", "grouped": "TPU v3", "reduced": "sm_75"}
CHIPS |= {"decoded": "cpu"}
assert CHIPS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize(
    ("chip", "dtype", "product"),
    [
        ("TPU v5 lite", "bfloat16", "tpu"),
        ("TPU v5", "bfloat16", "tpu"),
        ("TPU v6 lite", "bfloat16", "tpu"),
        ("TPU7x", "bfloat16", "tpu"),
        ("TPU v5 lite", "float32", "grouped"),
        ("TPU v4", "bfloat16", "grouped"),
        ("TPU v2", "bfloat16", "grouped"),
        ("sm_90", "bfloat16", "gpu"),
        ("sm_80", "float16", "gpu"),
        ("sm_100", "bfloat16", "gpu"),
        ("sm_90", "float32", "reduced"),
        ("sm_75", "float16", "reduced"),
        ("cpu", "bfloat16", "decoded"),
        ("rocm", "bfloat16", "decoded"),
    ],
)
def test_the_product_chosen(chip, dtype, product):
    assert choose(chip, dtype, 51, 172) == product
    assert unsupported(product, chip, dtype, 51, 172) is None


def test_a_chip_is_told_from_its_device():
    def device(platform, kind, **more):
        return types.SimpleNamespace(platform=platform, device_kind=kind, **more)

    assert chip_of(device("tpu", "TPU v5 lite")) == "TPU v5 lite"
    assert chip_of(device("gpu", "NVIDIA H200", compute_capability="9.0")) == "sm_90"
    assert chip_of(device("gpu", "AMD Instinct", compute_capability="gfx942")) == "gpu"
    assert chip_of(jax.devices("cpu")[0]) == "cpu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tpu", "cpu", "bfloat16", 8, 64), ("'tpu'", "[8, 64]", "cpu", "'grouped'")),
        (("tpu", "TPU v4", "bfloat16", 8, 64), ("TPU v4", "v5e")),
        (("tpu", "TPU v5 lite", "float32", 8, 64), ("float32", "bfloat16 alone")),
        (("tpu", "TPU v5 lite", "bfloat16", 8, 2**18), ("[8, 262144]", "131072")),
        (("gpu", "sm_75", "bfloat16", 8, 64), ("sm_75", "8.0", "'reduced'")),
        (("gpu", "sm_90", "float32", 8, 64), ("float32", "float16")),
        (("tpu", "TPU v5 lite", "bfloat16", 8, 96, 1, 4), ("[8, 96]", "4 devices along K", "MX blocks of 32")),
        (("gpu", "sm_90", "bfloat16", 8, 96, 1, 2), ("2 devices along K", "MX blocks of 32")),
        (("grouped", "TPU v3", "bfloat16", 9, 96, 2, 1), ("[9, 96]", "2 devices along N")),
        (("cuda", "sm_90", "bfloat16", 8, 64), ("'cuda'", "grouped")),
    ],
)
def test_what_is_refused_and_how(arguments, words):
    reason = unsupported(*arguments)
    assert len(reason.splitlines()) == 1
    for word in words:
        assert word in reason


def test_a_named_product_on_the_wrong_device_is_refused_before_tracing():
    leaf = quantize(jnp.ones((8, 64)))
    with pytest.raises(NotImplementedError, match=r"'gpu' for bfloat16 \[M, 64\] and an MXFP4 weight \[8, 64\] on cpu"):
        layouts.for_device(("model", None), leaf, dtype=jnp.bfloat16, mesh=None, product="gpu")


def test_activations_of_another_dtype_are_refused():
    w = layouts.laid_out(quantize(jnp.ones((8, 64))), "tpu", "TPU v5 lite", dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="takes bfloat16 alone"):
        linear(jnp.ones((2, 64), jnp.float32), w)


def test_on_cpu_the_stored_weight_stays():
    leaf, other = quantize(jnp.ones((8, 64))), quantize(jnp.ones((8, 64)), "mxfp8_e4m3")
    assert layouts.for_device(("model", None), leaf, dtype=jnp.bfloat16, mesh=None) is leaf
    assert layouts.for_device(("model", None), other, dtype=jnp.bfloat16, mesh=None, product="gpu") is other
    assert implementation("TPU v5 lite") == "XLA dot; Pallas TPU kernel for mxfp4"
    assert implementation("sm_80") == "XLA dot; Pallas GPU kernel for mxfp4"
    assert "reduced" in implementation("sm_75")


@pytest.mark.parametrize("product", [name for name in LAYOUTS if CHIPS[name] in ("TPU v3", "sm_75", "cpu")])
@pytest.mark.parametrize("rows", [3, 20])
def test_linear_on_a_laid_out_weight(product, rows):
    """K is no multiple of a block, and x has two axes before it."""
    r = np.random.RandomState(rows)
    w, x = (jnp.asarray(r.standard_normal(shape), jnp.float32) for shape in ((50, 172), (rows, 2, 172)))
    leaf = quantize(w)
    found = jax.jit(linear)(x, layouts.laid_out(leaf, product, CHIPS[product], dtype=jnp.float32))
    assert found.shape == (rows, 2, 50)
    blocks = jnp.pad(x.reshape(2 * rows, 172), ((0, 0), (0, -172 % 32)))
    for y in (found, linear(x, leaf)):  # within what float32 sums cost of the float64 product, in whatever order
        mx_weights.assert_product(np.asarray(y).reshape(2 * rows, 50), blocks, leaf.packed, leaf.scales)


@pytest.mark.parametrize("product", LAYOUTS)
def test_one_signature(product):
    """The products by name, those in Pallas interpreted, agree with their definition."""
    x, packed, scales = mx_weights.random(33, 96, 3)
    arrays = lay_out(product, packed, scales)
    found = np.asarray(laid_out_matmul(product, x, arrays, 33, CHIPS[product], interpret=True))
    mx_weights.assert_product(found, x, packed, scales)
    axes = [len(entry) for entry in LAYOUTS[product]]
    assert axes == [array.ndim for array in arrays]


def test_a_laid_out_leaf_takes_the_place_of_the_stored_one():
    params = {"model.layers.0.mlp.up_proj.weight": jnp.ones((64, 96)), "model.norm.weight": jnp.ones(96)}

    def finish(axes, leaf):
        return layouts.laid_out(leaf, "grouped", "TPU v3", dtype=jnp.bfloat16)

    params |= {"lm_head.weight": jnp.ones((70, 96))}
    tensors = {name: Tensor(leaf.shape, (), leaf.ndim == 2, ()) for name, leaf in params.items()}
    twin = quantize_params(params, tensors, finish=finish)
    leaf = twin["model.layers.0.mlp.up_proj.weight"]
    assert not [leaf for leaf in twin.values() if isinstance(leaf, MXFP4Array)]
    assert (leaf.shape, leaf.size, leaf.format) == ((64, 96), 64 * 96, "mxfp4")
    assert leaf.nbytes == 64 * 96 * 17 // 32
    assert twin["model.norm.weight"] is params["model.norm.weight"]
    with pytest.raises(ValueError, match="is in mxfp4 already"):
        quantize_params(twin, tensors, "mxfp8_e4m3")


# Prints, for each product and each way to split a weight, where its arrays lie; the results are checked on the way.
SCRIPT = """
import json
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import mx_weights
from mlspecqd_jax.weights import layouts
from mlspecqd_jax.weights.mx import MXFP4Array
from mlspecqd_jax.weights.placement import usable_mesh
from test_layouts import CHIPS

mesh, found = usable_mesh(jax.make_mesh((4,), ("model",))), {}
x, packed, scales = mx_weights.random(136, 4 * 96, 5)
for product, chip in CHIPS.items():
    for name, spec in {"n": P("model", None), "k": P(None, "model"), "whole": P(None, None)}.items():
        leaf = jax.device_put(MXFP4Array(packed, scales, 4 * 96), NamedSharding(mesh, spec))
        w = layouts.laid_out(leaf, product, chip, dtype="bfloat16", mesh=mesh, spec=spec)

        def run(x, w):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return layouts.laid_out_product(x, w, interpret=True)

        mx_weights.assert_product(np.asarray(jax.jit(run)(x, w)), x, packed, scales)
        shards = {array.addressable_shards[0].data.size / array.size for array in w.arrays}
        found[f"{product} {name}"] = sorted(float(share) for share in shards)
few = MXFP4Array(packed[:, :48], scales[:, :3], 96)
try:
    layouts.laid_out(few, "tpu", "TPU v5 lite", dtype="bfloat16", mesh=mesh, spec=P(None, "model"))
except NotImplementedError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_split_over_four_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "weights")])
    environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    process = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert "4 devices along K" in found.pop("refused")
    assert len(found) == 3 * len(LAYOUTS)
    for name, shares in found.items():
        # What the GPU kernel multiplies outputs by is the same for all parts of K.
        assert shares == ([1.0] if name.endswith("whole") else [0.25, 1.0] if name == "gpu k" else [0.25]), name
