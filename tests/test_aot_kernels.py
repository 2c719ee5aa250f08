"""Every MXFP4 product compiled for its chips at every linear shape of three models, and the cost of decoding on TPU.

Needs the `aot` extra (the compilers of both vendors, without drivers). Nothing is run.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import chips
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from programs import LLAMA_8B, QWEN3_06B, QWEN25_7B, plain

from mlspecqd_jax import layouts
from mlspecqd_jax.quantization import QUANTIZABLE, _matches
from pallas_kernels import LAYOUTS, chip_of, choose, laid_out_matmul, lay_out

pytestmark = pytest.mark.aot
MODELS = {"Llama-3.1-8B": LLAMA_8B, "Qwen2.5-7B": QWEN25_7B, "Qwen3-0.6B": QWEN3_06B}
CHIPS = {"v5e:1x1": "tpu", "v6e:1x1": "tpu", "v5p:1x1x1": "tpu", "H200": "gpu", "A100": "gpu", "L4": "gpu"}
WITHOUT_PALLAS = {"v4:1x1x1": "grouped", "v2:1x1": "grouped", "T4": "reduced"}


def shapes(config):
    """Return the different [N, K] of a model's quantized weights, its head (tied or not) included."""
    mesh = chips.mesh("v5e:1x1")
    found = {leaf.shape for name, leaf in plain(config, mesh).items() if _matches(name, QUANTIZABLE)}
    return sorted(found | {(config.vocab_size, config.hidden_size)})
