"""Prompts from files and stdin: UTF-8 text, with a byte order mark or without, and lines that end in LF or CRLF."""

import json
import pathlib
import sys

from mlspecqd_jax.errors import InputError


def read(name: str) -> list[str]:
    """Return the prompts of a file: the whole of it without one newline at its end, or of a .jsonl file one a line.

    A line of JSON is a string, or an object with a string "prompt"; only LF and CRLF end a line, blank ones are passed over.

    Args:
      name: a path, or - for stdin, which is one prompt.

    Raises:
      InputError: the file cannot be read, is not UTF-8, holds no prompt, or a line is none.
    """
    try:
        data = sys.stdin.buffer.read() if name == "-" else pathlib.Path(name).read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {name} is not UTF-8 text ({error.reason}); convert it first") from error
    except (OSError, AttributeError, ValueError) as error:  # stdin is closed; a name holds a null character
        reason = getattr(error, "strerror", None) or "there is nothing of this name"
        raise InputError(f"--prompt-file {name} cannot be read ({reason}); check the path") from error
    if not name.endswith(".jsonl"):
        return [text.removesuffix("\n")]
    prompts = [_prompt(name, i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise InputError(f"--prompt-file {name} holds no prompt; give at least one line")
    return prompts


def _prompt(name: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise InputError(f'--prompt-file {name}, line {number}: needs a JSON string or an object with a "prompt" string')
    return value
