"""Weights arranged for a chip: what stays stored, what is refused, `linear` on them, and splitting them over devices."""

import dataclasses
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
from compiling import quick_flags
from jax.sharding import PartitionSpec

from mlspecqd_jax.network.ops import implementation, linear, row_multiple
from mlspecqd_jax.weights import layouts
from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.quantization import place_quantized, quantize_params
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from mlspecqd_jax.weights.tensors import Tensor

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHIPS = mx_weights.CHIPS


def test_a_named_product_on_the_wrong_device_is_refused_before_tracing():
    leaf = quantize(jnp.ones((8, 64)))
    with pytest.raises(NotImplementedError, match=r"'gpu' for bfloat16 \[M, 64\] and an MXFP4 weight \[8, 64\] on cpu"):
        layouts.for_device(leaf, dtype=jnp.bfloat16, mesh=None, product="gpu")


def test_a_weight_whose_parts_are_no_whole_blocks_stays_as_it_is_stored():
    """Its scales divide, K does not: XLA splits what decodes it."""
    mesh = types.SimpleNamespace(devices=np.array(jax.devices()), shape={"model": 4})
    leaf = dataclasses.replace(quantize(jnp.ones((8, 250))), spec=PartitionSpec(None, "model"))
    assert layouts.for_device(leaf, dtype=jnp.bfloat16, mesh=mesh) is leaf


def test_activations_of_another_dtype_are_refused():
    w = layouts.arrange(quantize(jnp.ones((8, 64))), "tpu", "TPU v5 lite", dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="takes bfloat16 alone"):
        linear(jnp.ones((2, 64), jnp.float32), w)


def test_on_cpu_the_stored_weight_stays():
    leaf, other = quantize(jnp.ones((8, 64))), quantize(jnp.ones((8, 64)), "mxfp8_e4m3")
    assert layouts.for_device(leaf, dtype=jnp.bfloat16, mesh=None) is leaf
    assert layouts.for_device(other, dtype=jnp.bfloat16, mesh=None) is other
    with pytest.raises(NotImplementedError, match=r"'gpu' for bfloat16 .* MXFP8_E4M3 weight .* reads mxfp4 alone"):
        layouts.for_device(other, dtype=jnp.bfloat16, mesh=None, product="gpu")
    assert implementation("TPU v5 lite") == "XLA dot; Pallas TPU kernel for mxfp4, another for other formats and experts"
    assert implementation("sm_80") == "XLA dot; Pallas GPU kernel for mxfp4, another for other formats and experts"
    assert "reduced" in implementation("sm_75")


@pytest.mark.parametrize("product", [name for name in CHIPS if CHIPS[name] in ("TPU v3", "sm_75", "cpu")])
@pytest.mark.parametrize("rows", [3, 20])
def test_linear_on_an_arranged_weight(product, rows):
    """K is no multiple of a block, and x has two axes before it."""
    r = np.random.RandomState(rows)
    w, x = (jnp.asarray(r.standard_normal(shape), jnp.float32) for shape in ((50, 172), (rows, 2, 172)))
    leaf = quantize(w)
    found = jax.jit(linear)(x, layouts.arrange(leaf, product, CHIPS[product], dtype=jnp.float32))
    assert found.shape == (rows, 2, 50)
    blocks = jnp.pad(x.reshape(2 * rows, 172), ((0, 0), (0, -172 % 32)))
    for y in (found, linear(x, leaf)):  # within what float32 sums cost of the float64 product, in whatever order
        mx_weights.assert_product(np.asarray(y).reshape(2 * rows, 50), blocks, **leaf.arrays)


def test_an_arranged_leaf_takes_the_place_of_the_stored_one(monkeypatch):
    params = {"model.layers.0.mlp.up_proj.weight": jnp.ones((64, 96)), "model.norm.weight": jnp.ones(96)}

    monkeypatch.setattr(layouts, "chip_of", lambda device: "TPU v3")
    params |= {"lm_head.weight": jnp.ones((70, 96))}
    tensors = {name: Tensor(leaf.shape, (), leaf.ndim == 2, ()) for name, leaf in params.items()}
    twin = quantize_params(params, tensors, dtype=jnp.bfloat16)
    leaf = twin["model.layers.0.mlp.up_proj.weight"]
    assert {leaf.product for leaf in twin.values() if isinstance(leaf, QuantizedArray)} == {"grouped"}
    assert (leaf.chip, row_multiple([leaf], "bfloat16", "TPU v3")) == ("TPU v3", 16)
    assert (leaf.shape, leaf.size, leaf.format) == ((64, 96), 64 * 96, "mxfp4")
    assert leaf.nbytes == 64 * 96 * 17 // 32
    assert twin["model.norm.weight"] is params["model.norm.weight"]
    with pytest.raises(ValueError, match="is in mxfp4 already"):
        quantize_params(twin, tensors, "mxfp8_e4m3")


def test_a_leaf_carries_how_it_is_split():
    mesh = jax.make_mesh((1,), ("model",))
    for axes in (("model", None), (None, "model")):
        leaf = place_quantized(Tensor((8, 64), axes, True, ()), quantize(jnp.ones((8, 64))), mesh)
        assert tuple(leaf.spec) == axes
        assert all(array.sharding.spec == leaf.spec for array in leaf.arrays.values())
    whole = Tensor((8, 64), (None, "model"), True, ())
    assert tuple(place_quantized(whole, quantize(jnp.ones((8, 64))), None).spec) == (None, None)


# Prints, for each product and each way to split a weight, where its arrays lie; the results are checked on the way.
SCRIPT = """
import json
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import mx_weights
from mlspecqd_jax.weights import layouts
from mlspecqd_jax.weights.placement import usable_mesh
from mlspecqd_jax.weights.products import multiply
from mlspecqd_jax.weights.quantized_array import QuantizedArray

mesh, found = usable_mesh(jax.make_mesh((4,), ("model",))), {}
x, packed, scales = mx_weights.random(136, 4 * 96, 5)
for product, chip in mx_weights.CHIPS.items():
    for name, spec in {"n": P("model", None), "k": P(None, "model"), "whole": P(None, None)}.items():
        leaf = QuantizedArray({"codes": packed, "scales": scales}, (136, 4 * 96), "mxfp4", spec=spec)
        leaf = jax.device_put(leaf, NamedSharding(mesh, spec))
        w = layouts.arrange(leaf, product, chip, dtype="bfloat16", mesh=mesh)

        def run(x, w):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return multiply(x, w, interpret=True)

        mx_weights.assert_product(np.asarray(jax.jit(run)(x, w)), x, packed, scales)
        shards = {array.addressable_shards[0].data.size / array.size for array in w.arrays.values()}
        found[f"{product} {name}"] = sorted(float(share) for share in shards)
few = {"codes": packed[:, :48], "scales": scales[:, :3]}
few = QuantizedArray(few, (136, 96), "mxfp4", spec=P(None, "model"))
try:
    layouts.arrange(few, "tpu", "TPU v5 lite", dtype="bfloat16", mesh=mesh)
except NotImplementedError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_split_over_four_devices():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "weights")])
    environment = os.environ | quick_flags("--xla_force_host_platform_device_count=4")
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    process = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert "4 devices along K" in found.pop("refused")
    assert len(found) == 3 * len(CHIPS)
    for name, shares in found.items():
        # What the GPU kernel multiplies outputs by is the same for all parts of K.
        assert shares == ([1.0] if name.endswith("whole") else [0.25, 1.0] if name == "gpu k" else [0.25]), name
