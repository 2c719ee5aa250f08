"""Products with experts' weights compiled for chips that are not here: what some position chose is read where it lies, once.

Needs the `aot` extra (the compilers of both vendors, without drivers). Nothing is run.
"""

import dataclasses
import functools
import math

import chips
import jax
import jax.numpy as jnp
import pytest
from hlo import HOST_OPERATIONS, aliased, computations, operations
from jax.sharding import PartitionSpec
from programs import compile_twin, on_mesh
from tiny import shape

from mlspecqd_jax.network.config import Experts, Router
from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.formats import format_of
from mlspecqd_jax.weights.products import multiply_experts
from pallas_kernels import OF_EXPERTS, best_product, chip_of

pytestmark = pytest.mark.aot
E, CHOSEN = 16, 4
GPT_OSS, QWEN = (2880, 2880), (768, 2048)  # N and K of a product; the first is no multiple of 128
SMALL = shape(4096, 2048, 768, 1, 16, 4, 128, 40960)


def experts_of(mesh, n, k, format, spec=(None, None)):
    """Return the leaf of all experts' weights, as it lies on the mesh."""
    w = jax.ShapeDtypeStruct((E * n, k), jnp.bfloat16)
    if format is None:
        return w
    leaf, chip = jax.eval_shape(functools.partial(quantize, format=format), w), chip_of(mesh.devices.flat[0])
    parts = [1 if axis is None else mesh.shape[axis] for axis in spec]
    product = best_product(chip, "bfloat16", E * n, k, *parts, format=format, products=OF_EXPERTS)
    how = {"format": format_of(format), "experts": E, "along_n": parts[0], "along_k": parts[1]}
    arrays = jax.eval_shape(functools.partial(product.arrange, **how), **leaf.core)
    return on_mesh(dataclasses.replace(leaf, arrays=arrays, product=product.name, chip=chip, spec=PartitionSpec(*spec)), mesh)


def compiled(chip, n, k, format, rows, each=1, spec=(None, None)):
    mesh = chips.mesh(chip)
    x, chosen = jax.ShapeDtypeStruct((rows, each, k), jnp.bfloat16), jax.ShapeDtypeStruct((rows, CHOSEN), jnp.int32)
    leaf = experts_of(mesh, n, k, format, spec)
    return chips.compile_for(mesh, functools.partial(multiply_experts, number=E), x, leaf, chosen)


def made(program, least):
    """Operations that make arrays of so many elements."""
    found = [each for lines in computations(program.as_text()).values() for each in operations(lines)]
    passive = ("parameter", "get-tuple-element", "bitcast", "tuple")
    return [each for each in found if each[0] not in passive and math.prod(each[2]) >= least]


@pytest.mark.parametrize("format", [None, "mxfp4"])
@pytest.mark.parametrize("chip", ["v5e:1x1", "v6e:1x1", "H200"])
def test_no_expert_is_copied_or_decoded(chip, format):
    """Nothing that the program makes is as large as a quarter of one expert, but for what goes in and comes out for all experts."""
    for (n, k), rows, each in ((GPT_OSS, 1, 1), (GPT_OSS, 16, CHOSEN), (QWEN, 16, 1)):
        program = compiled(chip, n, k, format, rows, each)
        assert not made(program, max(n * k // 4, 4 * rows * CHOSEN * max(n, k) + 1)), (n, k, rows)
        assert program.memory_analysis().temp_size_in_bytes < n * k


def test_a_loop_goes_around_where_no_kernel_takes_k():
    """On TPU XLA stores plain weights of GPT-OSS's K with N last; its own loop reads one expert after another out of that."""
    for (n, k), loops in ((GPT_OSS, True), (QWEN, False)):
        assert ("while(" in compiled("v5e:1x1", n, k, None, 1).as_text()) == loops


def test_split_over_four_chips():
    """Each holds a part along K of every expert, and there is no exchange but one sum."""
    n, k = 256, 4096
    program = compiled("v5e:2x2", n, k, "mxfp4", 1, spec=(None, "model"))
    assert program.memory_analysis().argument_size_in_bytes < 1.1 * E * n * k * 17 / 32 / 4 + 2**18
    hlo = program.as_text()
    assert "all-reduce" in hlo
    assert not [word for word in ("all-gather(", "all-to-all(", "collective-permute(") if word in hlo]


@pytest.mark.parametrize("chip", ["v5e:1x1", "H200"])
def test_a_loop_of_a_mixture_and_its_twin(chip):
    """Of the target's and the draft's weights no stack is copied, not even ahead into a TPU's own memory, and none is decoded."""
    mixture = dataclasses.replace(SMALL.layers[0], feed=Experts(Router(E, CHOSEN, "softmax"), 768))
    config = dataclasses.replace(SMALL, layers=(mixture,))
    program = compile_twin(chips.mesh(chip), config, 3, 1, 1280)
    hlo = program.as_text()
    assert not HOST_OPERATIONS.search(hlo)
    assert not made(program, E * 768 * SMALL.hidden_size // 2)  # elements: no other weight has so many
    cache = (1, mixture.mixer.kv_heads, 1280, mixture.mixer.head_dim)
    caches, in_place = aliased(hlo, "bf16", cache)
    assert len(caches) == 2
    assert in_place == caches
