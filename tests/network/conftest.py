"""Networks of every family with the weights of its checkpoint."""

import functools

import jax.numpy as jnp
import pytest
import tiny

from mlspecqd_jax.loading import config_file
from mlspecqd_jax.network.network import Network


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from a family's name to (network, float32 parameters), whose names and shapes are those of its checkpoint."""

    @functools.cache
    def read(family):
        config = tiny.FAMILIES[family]
        network = Network(config_file.read_config(tiny.write_family(tmp_path_factory.mktemp(family), family)))
        assert {name: tensor.shape for name, tensor in network.tensors().items()} == tiny.shapes(config)
        return network, {name: jnp.asarray(value) for name, value in tiny.weights(config, family).items()}

    return read
