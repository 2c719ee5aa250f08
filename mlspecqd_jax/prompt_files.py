"""Prompts and conversations from files and stdin: UTF-8, with a byte order mark or without, and lines that end in LF or CRLF."""

import json
import pathlib
import sys

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError


def read(name: str) -> list[str]:
    """Return the prompts of a file: the whole of it without one newline at its end, or of a .jsonl file one a line.

    A line of JSON is a string, or an object with a string "prompt"; only LF and CRLF end a line, blank ones are passed over.

    Args:
      name: a path, or - for stdin, which is one prompt.

    Raises:
      InputError: the file cannot be read, is not UTF-8, holds no prompt, or a line is none.
    """
    text = _text("--prompt-file", name)
    if not name.endswith(".jsonl"):
        return [text.removesuffix("\n")]
    prompts = [_prompt(name, i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise InputError(f"--prompt-file {name} holds no prompt; give at least one line")
    return prompts


def read_conversations(name: str) -> list[list[dict]]:
    """Return the conversations of a file of JSON: a list of messages, or a list of such lists.

    What a message must have is left to those who take it.

    Args:
      name: a path, or - for stdin.

    Raises:
      InputError: the file cannot be read, is not UTF-8, or holds anything else.
    """
    needed = "a list of messages (objects with a role and a content), or a list of such lists"
    text = _text("--messages", name)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--messages {name} is no JSON ({brief(str(error))}); give {needed}") from None
    several = isinstance(value, list) and all(isinstance(entry, list) for entry in value)
    conversations = value if several else [value]
    if not conversations:
        raise InputError(f"--messages {name} holds no conversation; give {needed}")
    for i, conversation in enumerate(conversations):
        if not isinstance(conversation, list) or not conversation:
            raise InputError(
                f"--messages {name}: prompt {i} is {brief(conversation)}, but must be a list of messages; give {needed}"
            )
        for j, message in enumerate(conversation):
            if not isinstance(message, dict):
                raise InputError(
                    f"--messages {name}: prompt {i}, message {j} is {brief(message)}, but must be an object; give {needed}"
                )
    return conversations


def _text(option: str, name: str) -> str:
    """Return the text of a file, or of stdin, without a mark, its lines ending in LF."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else pathlib.Path(name).read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {name} is not UTF-8 text ({error.reason}); convert it first") from error
    except (OSError, AttributeError, ValueError) as error:  # stdin is closed; a name holds a null character
        reason = getattr(error, "strerror", None) or "there is nothing of this name"
        raise InputError(f"{option} {name} cannot be read ({reason}); check the path") from error


def _prompt(name: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise InputError(f'--prompt-file {name}, line {number}: needs a JSON string or an object with a "prompt" string')
    return value
