"""Writes a 1.1B-parameter Llama-shaped checkpoint of random BF16 weights, in shards, holding no tensor in memory.

python benchmarks/large_checkpoint.py FOLDER
"""

import argparse
import contextlib
import json
import math
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from mlspecqd_jax.loading.config_file import read_config
from mlspecqd_jax.network.network import Network

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
BF16 = 2  # bytes


def write_checkpoint(folder: Path, shards: int = 3) -> None:
    """Write CONFIG's tensors in Hugging Face's layout, from one block of normal(0, 0.02) values over and over."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {name: tensor.shape for name, tensor in Network(read_config(folder)).tensors().items()}
    block = (0.02 * np.random.default_rng(0).standard_normal(2**20)).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for shard, names in enumerate(np.array_split(list(shapes), shards), 1):
        file = f"model-{shard:05}-of-{shards:05}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in map(str, names):
            begin, end = end, end + BF16 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in map(str, names):
                size = math.prod(shapes[name])
                for at in range(0, size, len(block)):
                    out.write(block[: size - at].tobytes())
    index = {"metadata": {"total_size": BF16 * sum(map(math.prod, shapes.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@contextlib.contextmanager
def model_folder(given: Path | None):
    """Give the folder of a model that was given, or of random weights that are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        if given is None:
            write_checkpoint(Path(folder) / "large")
        yield given or Path(folder) / "large"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new folder (2.2 GB)")
    write_checkpoint(parser.parse_args().folder)


if __name__ == "__main__":
    main()
