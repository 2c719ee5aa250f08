"""A folder's tokenizer: tokenizer.json as it is, with the special tokens and the chat template of the files beside it.

No class that a file names is looked for and no code of the folder is run or asked about: tokenizer.json says all there is to say.
"""

import os
import pathlib
from typing import Any

import tokenizers

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import read_json_if_there, read_text, reason
from mlspecqd_jax.text.fast_tokenizer import NAMED, FastTokenizer, is_enough

FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
OTHERS = ("tokenizer.model", "vocab.json")  # forms that tokenizer.json can be made from
LARGEST = 2**29  # bytes of tokenizer.json
LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def describe(folder: pathlib.Path) -> str:
    """Return "yes", "none", or the file of a form that `read_tokenizer` refuses."""
    name = _found(folder)
    return "none" if name is None else "yes" if name == FILE else f"{name}, which is not read"


def _found(folder: pathlib.Path) -> str | None:
    return next((name for name in (FILE, *OTHERS) if os.path.isfile(folder / name)), None)


def read_tokenizer(folder: pathlib.Path):
    """Return the folder's tokenizer, a `FastTokenizer` or else transformers' own, or None where it holds none.

    Raises:
      InputError: there is one, but without tokenizer.json, or its files cannot be read.
    """
    path, found = folder / FILE, _found(folder)
    if found is None:
        return None
    if found != FILE:
        raise InputError(
            f"{folder} holds {found}, but not tokenizer.json, which is what is read; write it with transformers "
            "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder)), or remove the file to give token ids"
        )
    if os.path.getsize(path) > LARGEST:
        raise InputError(f"{path} is larger than {LARGEST // 2**20} MB, which no tokenizer is; download it again")
    config = read_json_if_there(folder / CONFIG)
    settings = _special_tokens(folder, config) | {"chat_template": _chat_template(folder, config)}

    def of_transformers():
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # its note that torch is missing
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_file=str(path), **settings)

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        return FastTokenizer(backend, settings, of_transformers) if is_enough(backend, settings) else of_transformers()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever transformers and tokenizers raise, panics included, becomes one sentence
        raise InputError(
            f"the tokenizer in {folder} cannot be read ({reason(error)}); download its tokenizer files again"
        ) from error


def _special_tokens(folder: pathlib.Path, config: dict) -> dict[str, Any]:
    """Return what tokenizer_config.json, and in older folders special_tokens_map.json, say of special tokens."""
    if "added_tokens_decoder" not in config:
        config = config | read_json_if_there(folder / "special_tokens_map.json")
    found = {name: _token(folder, name, config[name]) for name in NAMED if config.get(name) is not None}
    for name in LISTS:
        tokens = config.get(name)
        if isinstance(tokens, dict):  # by names of the model's own
            tokens = list(tokens.values())
        if tokens:
            if not isinstance(tokens, list):
                raise InputError(f"{folder / CONFIG}: {name} is {brief(tokens)}, but must be a list of tokens; correct that key")
            found["extra_special_tokens"] = [_token(folder, name, token) for token in tokens]
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(isinstance(i, str) and i.isdecimal() and len(i) < 10 for i in added):
        raise InputError(f"{folder / CONFIG}: added_tokens_decoder must be an object of tokens by id; correct that key")
    return found | {"added_tokens_decoder": {int(i): _token(folder, f"token {i}", token) for i, token in added.items()}}


def _token(folder: pathlib.Path, name: str, value: Any):
    """Return a token as it was written: a text, or an object with its content and how it is matched."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise InputError(f"{folder / CONFIG}: {name} is {brief(value)}, but must be a token; correct that key")
    return tokenizers.AddedToken(value["content"], **{flag: value[flag] for flag in FLAGS if isinstance(value.get(flag), bool)})


def _chat_template(folder: pathlib.Path, config: dict) -> str | None:
    """Return the text of chat_template.jinja, or else of tokenizer_config.json's chat_template, its default of several."""
    if os.path.isfile(folder / TEMPLATE):
        return read_text(folder / TEMPLATE)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t["name"]: t.get("template") for t in template if isinstance(t, dict) and isinstance(t.get("name"), str)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"{folder / CONFIG}: chat_template is {brief(template)}, but must be text; correct that key, or remove it to do without"
        )
    return template
