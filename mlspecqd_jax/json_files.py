"""Small files of a checkpoint folder: text and JSON objects that a stranger wrote, bounded in size, and refused in one sentence."""

import json
import os
import pathlib

from mlspecqd_jax.errors import InputError

LARGEST = 16 * 2**20  # bytes; the index of the largest models takes some 10 MB


def read_text(path: pathlib.Path, largest: int = LARGEST) -> str:
    """Return a file's text.

    Raises:
      InputError: it is missing, cannot be read, is larger than `largest` bytes, or is no UTF-8 text.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path} is missing; the folder needs config.json and .safetensors files as Hugging Face writes them")
    try:
        with open(path, "rb") as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            raise InputError(f"{path} is larger than {largest // 2**20} MB, which no such file is; download it again")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); download it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def read_json(path: pathlib.Path) -> dict:
    """Return the JSON object that a file holds.

    Raises:
      InputError: as `read_text`, or it holds no JSON, another value than an object, or too deep a nesting.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply; download it again") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, but must hold a JSON object; download it again")
    return value


def read_json_if_there(path: pathlib.Path) -> dict:
    """Return the JSON object that a file holds, an empty one where there is no such file."""
    return read_json(path) if os.path.isfile(path) else {}


def reason(error: BaseException) -> str:
    """Return what another package says is wrong, on one line, and not too long."""
    return printable(str(error))[:200] or type(error).__name__


def printable(text: str) -> str:
    """Return a text of a file, such as a tensor's name, on one line and without what would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
