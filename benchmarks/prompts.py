"""Reads prompts as people have published them: texts to continue, functions to complete, and questions to answer in a chat."""

import gzip
import json
from pathlib import Path

TO_CONTINUE = ("prompt",)
TO_ANSWER = ("question", "instruction", "text")


def read(paths: list[Path], number: int, words: int, tokenizer) -> list[list[int]]:
    """Return the token ids of prompts, from each file in turn.

    Args:
      paths: .json, a list of texts of which the first words are continued; or .jsonl or .jsonl.gz, of whose lines a `prompt` is
        continued, and a `question`, `instruction` or `text` is asked as a user's message where the tokenizer has a chat template.
      number: of prompts in all.
      words: of each text of a .json file.
    """
    kinds = [texts(path, words) for path in paths]
    in_turn = [prompt for prompts in zip(*kinds, strict=False) for prompt in prompts][:number]
    return [encoded(tokenizer, text, asked) for text, asked in in_turn]


def texts(path: Path, words: int) -> list[tuple[str, bool]]:
    """Return (text, whether it asks for an answer) of every prompt of a file."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return [(" ".join(text.split()[:words]), False) for text in json.loads(data)]
    rows = [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines() if line.strip()]
    found = []
    for row in rows:
        key = next(key for key in (*TO_CONTINUE, *TO_ANSWER) if key in row)
        found.append((row[key], key in TO_ANSWER))
    return found


def encoded(tokenizer, text: str, asked: bool) -> list[int]:
    """Return a prompt's token ids, as a chat if it asks for an answer and the tokenizer can wrap it as one."""
    if asked and tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return tokenizer(text).input_ids
