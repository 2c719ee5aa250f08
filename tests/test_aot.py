"""The three-level loop compiled for chips that are not here: it fits, it copies no cache, and it updates the donated ones in place.

Needs the `aot` extra (the compilers of both vendors, without drivers). Nothing is run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import HOST_OPERATIONS, aliased, cache_copies, widened
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlspecqd_jax import speculation
from mlspecqd_jax.levels import Level
from mlspecqd_jax.quantization import quantize_params
from mlspecqd_jax.sampling import Sampling
from mlspecqd_jax.transformer import LanguageModel, ModelConfig

pytestmark = pytest.mark.aot

# Of public data sheets.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""
CHIPS = {
    "v5e": {"platform": "tpu", "topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)},
    "H200": {"platform": "cuda", "target_config": H200, "topology": "1x1x1"},
}
TARGET = ModelConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
)
SMALL = dataclasses.replace(
    TARGET, hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=12, num_hidden_layers=1
)
BATCH, SIZE = 1, 1024


@pytest.fixture(scope="module", params=CHIPS)
def mesh(request):
    try:
        chip = topologies.get_topology_desc(**CHIPS[request.param])
    except Exception as error:  # whatever the plugin's absence raises
        pytest.skip(f"no compiler for {request.param} here ({type(error).__name__}); install the aot extra")
    return Mesh(np.array(chip.devices), ("x",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def program(mesh):
    """The compiled `advance` of target > twin on the same cache > small twin on a cache of its own."""
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)

    def params(config):
        return {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in LanguageModel(config).shapes().items()}

    def twin(config):
        return jax.eval_shape(quantize_params, params(config))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        innermost = Level(LanguageModel(SMALL), placed(twin(SMALL)))
        middle = Level(LanguageModel(TARGET), placed(twin(TARGET)), innermost, 3, share_cache=True)
        stack = Level(LanguageModel(TARGET), placed(params(TARGET)), middle, 7, window_multiple=16)
        sampling = placed(Sampling.create(BATCH, TARGET.vocab_size))
        tokens = placed(jax.ShapeDtypeStruct((BATCH, SIZE), jnp.int32))
        row = placed(jax.ShapeDtypeStruct((BATCH,), jnp.int32))
        state = placed(jax.eval_shape(speculation.init, stack, tokens, row, sampling))
        rounds = placed(jax.ShapeDtypeStruct((), jnp.int32))
        advance = jax.jit(speculation.advance, donate_argnames="state")
        options = {"xla_gpu_autotune_level": "0"} if mesh.devices.flat[0].platform == "gpu" else {}  # there is nothing to time on
        return advance.trace(stack, state, row, sampling, rounds).lower().compile(options)


def cache_shape(config):
    return BATCH, config.num_key_value_heads, SIZE, config.head_dim


def test_the_loop_copies_no_cache_and_stays_on_the_device(program):
    hlo = program.as_text()
    assert not HOST_OPERATIONS.search(hlo)
    for config in (TARGET, SMALL):
        assert not cache_copies(hlo, cache_shape(config)[1:])


def test_the_donated_caches_are_updated_where_they_are(program):
    for config in (TARGET, SMALL):
        caches, in_place = aliased(program.as_text(), "bf16", cache_shape(config))
        assert len(caches) == 2 * config.num_hidden_layers
        assert in_place == caches


def test_no_weight_is_widened(program):
    shapes = {shape for config in (TARGET, SMALL) for shape in LanguageModel(config).shapes().values() if len(shape) == 2}
    assert not widened(program.as_text(), shapes)


def test_few_weights_are_decoded_at_a_time(program, mesh, request):
    """Neither hoisted out of the loop nor kept: what is alive at once is less than one layer and the head of the twin decoded."""
    if mesh.devices.flat[0].platform == "tpu":
        request.applymarker(pytest.mark.xfail(reason="XLA:TPU keeps 32-bit steps of the decoding of several weights", strict=True))
    layer = sum(
        2 * int(np.prod(shape))
        for name, shape in LanguageModel(TARGET).shapes().items()
        if ".layers.0." in name or "lm_head" in name
    )
    assert program.memory_analysis().temp_size_in_bytes < layer
