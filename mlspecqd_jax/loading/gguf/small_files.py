"""The small files of a folder in Hugging Face's layout that say what a GGUF file's keys say."""

import json
import pathlib
from typing import Any

from mlspecqd_jax.loading.gguf.architectures import config_json
from mlspecqd_jax.loading.gguf.reader import GGUF
from mlspecqd_jax.loading.gguf.tokenizer import ROLES, end_token_ids, read_tokenizer
from mlspecqd_jax.text import tokenizer_files

SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def generation_config(file: GGUF) -> dict[str, Any]:
    """Return generation_config.json: the ids that end a text, and how its makers sample."""
    sampling = {name: file.keys.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    return {"eos_token_id": end_token_ids(file)} | {name: value for name, value in sampling.items() if value is not None}


def write(file: GGUF, folder: pathlib.Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files to a folder."""
    _write(folder / "config.json", config_json(file))
    _write(folder / "generation_config.json", generation_config(file))
    tokenizer = read_tokenizer(file)
    if tokenizer is None:
        return
    tokenizer.backend_tokenizer.save(str(folder / tokenizer_files.FILE))
    _write(folder / tokenizer_files.CONFIG, {role: token for role in ROLES if (token := getattr(tokenizer, role)) is not None})
    if tokenizer.chat_template is not None:
        (folder / tokenizer_files.TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")


def _write(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
