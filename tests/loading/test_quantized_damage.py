"""Quantized folders damaged by kind and at random: each is read, or refused in one sentence by this project."""

import copy
import random

import numpy as np
import pytest
import quantized_folders as made
from test_damaged_folders import VALUES, said

from mlspecqd_jax.loading import config_file
from mlspecqd_jax.loading.quantized.folder import open_folder
from mlspecqd_jax.loading.quantized.method import Quantization, find_quantization, reader_of
from mlspecqd_jax.network.network import Network

pytestmark = pytest.mark.filterwarnings("ignore:.*left out what this model does not use")
PLAIN = made.weights()


def leaves_of(folder):
    network = Network(config_file.read_config(folder))
    return dict(open_folder(folder, network).leaves(reader_of(find_quantization(folder))))


def paths(value, above=()):
    """Yield the way to every value inside an object."""
    for key, inner in value.items():
        yield (*above, key)
        if isinstance(inner, dict):
            yield from paths(inner, (*above, key))


@pytest.mark.parametrize("layout", made.LAYOUTS)
def test_a_key_of_another_value(tmp_path, layout):
    tensors, _ = made.quantized(layout, PLAIN)
    config = made.LAYOUTS[layout][0]
    folder = made.write(tmp_path / "q", tensors, config)
    module = next(iter(open_folder(folder, Network(config_file.read_config(folder))).modules.values()))
    for path in paths(config):
        for value in VALUES:
            changed = inner = copy.deepcopy(config)
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            quantization = Quantization(config["quant_method"], changed, folder / "config.json")
            problems = said(lambda _, quantization=quantization: reader_of(quantization)(module), folder)
            assert not any(problems), f"{path}: {value!r:.30}: {problems}"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("layout", ["gptq act-order", "uint4", "modelopt nvfp4", "fp8 tiles"])
def test_bytes_changed_at_random(tmp_path, layout, seed):
    tensors, _ = made.quantized(layout, PLAIN)
    folder = made.write(tmp_path / "q", tensors, made.LAYOUTS[layout][0])
    intact, rng = (folder / "model.safetensors").read_bytes(), random.Random(seed)
    assert said(leaves_of, folder) == []
    for case in range(12):
        damaged = bytearray(intact)
        start = 0 if case % 3 else 2000  # in the header or in the values
        for _ in range(rng.choice((1, 4, 40))):
            damaged[start + rng.randrange(1500)] = rng.randrange(256)
        if case % 4 == 3:
            damaged = damaged[: rng.randrange(len(damaged))]
        (folder / "model.safetensors").write_bytes(damaged)
        assert not any(said(leaves_of, folder)), case


def test_shards_hold_what_one_file_holds(tmp_path):
    tensors, _ = made.quantized("fp8 tiles", PLAIN)
    folder = made.write(tmp_path / "q", tensors, made.LAYOUTS["fp8 tiles"][0])
    whole = leaves_of(folder)
    names = list(tensors)
    made.split(folder, {name: tensors[name] for name in names[::2]}, {name: tensors[name] for name in names[1::2]})
    for name, leaf in leaves_of(folder).items():
        ours, theirs = (x.arrays if hasattr(x, "arrays") else {"plain": x} for x in (leaf, whole[name]))
        for role in theirs:
            np.testing.assert_array_equal(ours[role], theirs[role])
