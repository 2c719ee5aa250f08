"""Texts to token ids: plain, or each as a user's message in a model's chat template; and which tokens end a chat's turn.

A template is rendered by another process (`render_templates`), which cannot outlast `SECONDS` nor fill the memory.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import printable

SECONDS = 20  # of waiting; the process limits its own processor time to less
LARGEST_TEMPLATE = 2**20  # characters
LARGEST_TEXT, TIMES = 2**18, 16  # characters that a template may put out: some for itself, and its messages so many times
PROCESS = pathlib.Path(__file__).with_name("render_templates.py")
ANSWER = "mlspecqd-7f3a"  # what no template writes itself


def encode_texts(card, texts: Sequence[str], *, chat: bool) -> list[list[int]]:
    """Return the token ids of each text.

    Args:
      card: the target's name and tokenizer.
      texts: what to encode.
      chat: wrap each text as a user's message by the tokenizer's chat template, ready for the assistant's answer.

    Raises:
      InputError: there is no tokenizer, no chat template, or one that cannot be rendered, or a text is not Unicode.
    """
    if not texts:
        return []
    if card.tokenizer is None:
        raise InputError(f"{card.name} has no tokenizer; put its tokenizer.json beside config.json, or give token ids")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"the prompt {text[:40]!r} is not valid Unicode; give UTF-8 text") from None
    if chat:
        if not card.tokenizer.chat_template:
            raise InputError(f"{card.name} has no chat template; leave out --chat, or use an instruction-tuned model")
        try:
            texts = render(card.tokenizer, [[{"role": "user", "content": text}] for text in texts], generation_prompt=True)
        except ValueError as error:
            raise InputError(f"the chat template of {card.name} {error}; leave out --chat, or correct the template") from error
    # A long text is judged by `prepare`; a template writes its special tokens itself.
    return [list(card.tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]) for text in texts]


def end_token_ids(tokenizer) -> tuple[int, ...]:
    """Return the ids that end an assistant's turn: the tokenizer's eos, and the special token that its template puts there.

    A template that cannot be rendered has none: it is refused when a chat is asked for.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return ()
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": ANSWER}]
    try:
        (text,) = render(tokenizer, [messages], generation_prompt=False)
    except ValueError:
        return tuple(ends)
    _, answer, rest = text.rpartition(ANSWER)
    following = tokenizer(rest.lstrip(), add_special_tokens=False, verbose=False)["input_ids"] if answer else []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(dict.fromkeys(ends + [i for i in following[:1] if i in special]))


def render(tokenizer, conversations: list[list[dict[str, str]]], *, generation_prompt: bool) -> list[str]:
    """Return the text that a tokenizer's chat template makes of each conversation.

    Raises:
      InputError: what the template does that it may not, without saying whose it is.
    """
    if len(tokenizer.chat_template) > LARGEST_TEMPLATE:
        raise InputError(f"is longer than {LARGEST_TEMPLATE:,} characters")
    size = max(len(message["content"]) for messages in conversations for message in messages)
    request = {
        "path": [folder for folder in sys.path if os.path.isabs(folder)],  # "" is wherever the process is, such as in the folder
        "template": tokenizer.chat_template,
        "conversations": conversations,
        "variables": dict(tokenizer.special_tokens_map) | {"add_generation_prompt": generation_prompt},
        "most": LARGEST_TEXT + TIMES * size,
    }
    try:
        process = subprocess.run(
            [sys.executable or "python3", "-I", "-S", str(PROCESS)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"does not end ({SECONDS} s)") from None
    except OSError as error:
        raise InputError(f"needs a process of its own, which cannot be started ({error.strerror})") from error
    if process.returncode < 0:  # a limit of the operating system stopped it
        raise InputError("does not end, or takes too much memory")
    if process.returncode:
        said = process.stderr.decode(errors="replace").split("\n")
        raise InputError(f"cannot be rendered ({brief(next(filter(None, reversed(said)), 'no reason given'))})")
    answer = json.loads(process.stdout)
    if "error" in answer:
        raise InputError(f"cannot be rendered ({printable(answer['error'])})")
    return answer["texts"]
