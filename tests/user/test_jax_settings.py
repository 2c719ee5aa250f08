"""A caller's settings of jax change nothing: neither whether it works, nor the text of a seed."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_flags
from tiny import write_family

import mlspecqd_jax as mlsd

pytestmark = pytest.mark.usefixtures("compiled_quickly")
ROOT = pathlib.Path(__file__).resolve().parents[2]
CHOICE = {
    "max_new_tokens": 9,
    "temperature": 0.9,
    "top_k": 30,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "seed": 3,
    "logprobs": True,
}

STRANGE = [
    lambda: jax.enable_x64(True),
    lambda: jax.numpy_dtype_promotion("strict"),
    lambda: jax.numpy_rank_promotion("raise"),
    lambda: jax.threefry_partitionable(False),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("qwen3"), "qwen3")


def generated(folder, rule="coupled"):
    model = mlsd.load(folder, dtype="float32")
    out = mlsd.generate(mlsd.stack(model, (model.quantized(), 2)), [[1, 2, 3], [4, 5]], rule=rule, **CHOICE)
    return out.tokens, out.logprobs


@pytest.mark.slow
def test_strange_settings_give_the_same_text(folder):
    usual = generated(folder)
    with STRANGE[0](), STRANGE[1](), STRANGE[2](), STRANGE[3]():
        assert generated(folder) == usual


@pytest.mark.slow
def test_strange_settings_around_a_users_own_jit_give_the_same_text(folder):
    stack = mlsd.stack(mlsd.load(folder, dtype="float32"))
    arguments = [np.ones((2, 512), np.int32), np.array([3, 2], np.int32), np.array([9, 9], np.int32)]
    sampling = mlsd.Sampling.create(2, stack.card.vocab_size, temperature=0.9, seed=3)

    def run():
        tokens, length, _ = jax.jit(mlsd.generate_tokens)(stack, *map(jnp.asarray, arguments), sampling)
        return np.asarray(tokens).tolist(), np.asarray(length).tolist()

    usual = run()
    with STRANGE[0](), STRANGE[1](), STRANGE[2](), STRANGE[3]():
        assert run() == usual


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        {
            "JAX_ENABLE_X64": "1",
            "JAX_NUMPY_DTYPE_PROMOTION": "strict",
            "JAX_NUMPY_RANK_PROMOTION": "raise",
            "JAX_THREEFRY_PARTITIONABLE": "0",
        },
        {"JAX_THREEFRY_PARTITIONABLE": "1"},
    ],
    ids=["all", "the usual noise"],
)
def test_strange_settings_of_the_environment_give_the_same_text(folder, setting):
    code = f"import test_jax_settings; print(test_jax_settings.generated({str(folder)!r}, 'rejection'))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "user")])
    environment = os.environ | quick_flags() | setting | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == str(generated(folder, "rejection")), run.stderr
