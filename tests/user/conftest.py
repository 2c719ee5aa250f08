"""Stacks and fast models for generation."""

import dataclasses

import pytest
from tiny import write_family

import mlspecqd_jax as mlsd
from mlspecqd_jax.network.network import Network


@pytest.fixture(scope="module")
def stack(demo):
    return mlsd.stack(demo)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model without a tokenizer that compiles fast."""
    return mlsd.load(write_family(tmp_path_factory.mktemp("qwen3"), "qwen3"), dtype="float32")


def shallow(model, name):
    """The model cut to its first layer, a fast one of the same tokenizer."""
    network = Network(dataclasses.replace(model.network.config, layers=model.network.config.layers[:1]))
    params = {name: model.params[name] + 0 for name in network.tensors()}
    return dataclasses.replace(model, network=network, params=params, card=dataclasses.replace(model.card, name=name))


@pytest.fixture(scope="module")
def other(demo):
    """Not the target's twin, and drafts badly."""
    return shallow(demo, "other")


@pytest.fixture(scope="module")
def quick(demo):
    """A target whose programs compile fast."""
    return shallow(demo, "quick")
