"""A real model, and prompts that people have written for one: instructions, functions to complete, problems to reason about."""

import gzip
import json
import os
import pathlib

import pytest

import mlspecqd_jax as mlsd

FOLDER = "MLSPECQD_REAL_MODEL"  # names the model's folder
LONGEST = 92  # tokens of a prompt: with 100 new ones it fits the least buffer


def load(dtype: str = "bfloat16") -> mlsd.Model:
    """Load the model of the folder that the environment names; skip where it names none."""
    folder = os.environ.get(FOLDER)
    if not folder:
        pytest.skip(f"needs {FOLDER}, the folder of an instruct model")
    return mlsd.load(folder, dtype=dtype)


def prompts(tokenizer, shared: pathlib.Path, number: int, longest: int = LONGEST) -> list[list[int]]:
    """Return token ids of prompts in turn from instructions (as chats), code, and reasoning (as chats), of many lengths."""
    kinds = (
        [chat(tokenizer, row["text"]) for row in lines(shared / "prompts" / "mbpp.jsonl")],
        [tokenizer(row["prompt"]).input_ids for row in lines(shared / "prompts" / "HumanEval.jsonl.gz")],
        [chat(tokenizer, row["question"]) for row in lines(shared / "prompts" / "gsm8k_test.jsonl")],
    )
    short = [[ids for ids in kind if len(ids) <= longest] for kind in kinds]
    return [ids for in_turn in zip(*short, strict=False) for ids in in_turn][:number]


def chat(tokenizer, text: str) -> list[int]:
    """Return the token ids of a user's message, at whose end the model answers."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def lines(path: pathlib.Path) -> list[dict]:
    """Return the objects of a JSONL file, compressed or not, of which the first few hundred are enough."""
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.splitlines()[:300]]
