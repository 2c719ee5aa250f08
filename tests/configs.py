"""The smallest config.json files of the supported families, and how they are read."""

import json

from mlspecqd_jax.loading import config_file

MINIMAL = {
    "vocab_size": 97,
    "hidden_size": 192,
    "intermediate_size": 51,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}
LLAMA = {"model_type": "llama"} | MINIMAL


def parse(tmp_path, config: dict):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return config_file.read_config(tmp_path)
