"""The three-level loop compiled for chips that are not here: it fits, it copies no cache, and it updates the donated ones in place.

Needs the `aot` extra (the compilers of both vendors, without drivers). Nothing is run.
"""

import collections
import dataclasses
import re

import chips
import pytest
from hlo import HOST_OPERATIONS, aliased, cache_copies, decoded, widened
from programs import LLAMA_8B, compile_guided, compile_stack, compile_twin
from tiny import shape

from mlspecqd_jax.network.network import Network

pytestmark = pytest.mark.aot

TARGET = dataclasses.replace(LLAMA_8B, layers=LLAMA_8B.layers[:2])
# A layer of Llama-3.2-1B with fewer key/value heads, so that its cache does not look like the target's attention scores, and of
# another width, so that no weight has as many elements as the sums of a product that is split along K.
SMALL = shape(128256, 1920, 8192, 1, 32, 4, 64, 131072, tie_word_embeddings=True)
BATCH, SIZE = 1, 1280  # so that no cache has as many elements as a weight


@pytest.fixture(scope="module", params=["v5e:1x1", "v5e:2x2", "H200"])
def mesh(request):
    return chips.mesh(request.param)


@pytest.fixture(scope="module")
def program(mesh):
    return compile_stack(mesh, TARGET, SMALL, BATCH, SIZE)


def cache_shape(config, mesh):
    """Of one layer's keys or values on one device."""
    return BATCH, config.layers[0].mixer.kv_heads // mesh.size, SIZE, config.layers[0].mixer.head_dim


def weights():
    """Return the shapes of both models' weights."""
    tensors = [tensor for config in (TARGET, SMALL) for tensor in Network(config).tensors().values()]
    return [tensor.shape for tensor in tensors if len(tensor.shape) == 2]


def test_the_loop_copies_no_cache_and_stays_on_the_device(program, mesh):
    hlo = program.as_text()
    assert not HOST_OPERATIONS.search(hlo)
    assert "f64[" not in hlo
    for config in (TARGET, SMALL):
        assert not cache_copies(hlo, [size for size in cache_shape(config, mesh) if size > 1])


def test_the_donated_caches_are_updated_where_they_are(program, mesh):
    for config in (TARGET, SMALL):
        caches, in_place = aliased(program.as_text(), "bf16", cache_shape(config, mesh))
        assert len(caches) == 2 * len(config.layers)
        assert in_place == caches


def test_no_weight_is_widened(program):
    assert not widened(program.as_text(), set(weights()))


def test_no_weight_is_decoded_in_memory(program, mesh):
    """Neither whole nor in part; and all that the program keeps beside its arguments is less than one of the MLP's would be."""
    assert not decoded(program.as_text(), {n * k // parts for n, k in weights() for parts in (1, mesh.size)})
    on_chip = chips.ON_CHIP["v5e"] if mesh.devices.flat[0].platform == "tpu" else 0
    one = 2 * TARGET.hidden_size * TARGET.layers[0].feed.size // mesh.size
    assert program.memory_analysis().temp_size_in_bytes < on_chip + one


def test_it_fits(program, mesh):
    memory = program.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert used < chips.MEMORY["v5e" if mesh.devices.flat[0].platform == "tpu" else "H200"]


@pytest.mark.parametrize("name", ["v5e:1x1", "H200"])
def test_windows_of_several_widths_copy_no_cache(name):
    """Law 8, of the autopilot's loop: each width is a loop of one trip or none, and all update the caches in place."""
    mesh = chips.mesh(name)
    hlo = compile_guided(mesh, TARGET, SMALL, BATCH, SIZE, (1, 4)).as_text()
    for config in (TARGET, SMALL):
        assert not cache_copies(hlo, [size for size in cache_shape(config, mesh) if size > 1])
        caches, in_place = aliased(hlo, "bf16", cache_shape(config, mesh))
        assert len(caches) == 2 * len(config.layers)
        assert in_place == caches


def test_exact_programs_share_the_products_of_the_target():
    """Each product of plain decoding is one of every stack's: the same call of a library that takes one algorithm for a shape."""
    mesh = chips.mesh("H200")
    found = []
    for draft_len in (0, 5):
        hlo = compile_twin(mesh, SMALL, draft_len, BATCH, SIZE).as_text()
        assert "__triton_gemm" not in hlo
        calls = re.findall(
            r"= \((\w+\[[\d,]+\]).*?custom_call_target=\"__cublas\S*\".*?(\"gemm_backend_config\":\{.*?\}),\"force", hlo
        )
        found.append(collections.Counter(calls))
    plain, stack = found
    assert sum(plain.values()) >= 6
    assert plain <= stack
