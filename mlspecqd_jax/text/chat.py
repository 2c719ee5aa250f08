"""Texts and conversations, by a model's chat template, to token ids; and which tokens end a chat's turn.

A template is rendered by another process (`render_templates`), which cannot outlast `SECONDS` nor fill the memory.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.json_files import printable
from mlspecqd_jax.text.conversations import Message

SECONDS = 20  # of waiting; the process limits its own processor time to less
LARGEST_TEMPLATE = 2**20  # characters
LARGEST_TEXT, TIMES = 2**18, 16  # characters that a template may put out: some for itself, and its messages so many times
PROCESS = pathlib.Path(__file__).with_name("render_templates.py")
ANSWER = "mlspecqd-7f3a"  # what no template writes itself


def encode_texts(card, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Return the token ids of each text.

    Args:
      card: the target's name and tokenizer.
      texts: what to encode.
      special: put before each text what the tokenizer puts before one, such as a BOS.

    Raises:
      InputError: there is no tokenizer, or a text is not Unicode.
    """
    if not texts:
        return []
    _check_tokenizer(card)
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"the prompt {text[:40]!r} is not valid Unicode; give UTF-8 text") from None
    # A long text is judged by `prepare`.
    return [list(card.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]) for text in texts]


def encode_conversations(
    card, conversations: Mapping[int, list[Message]], variables: Mapping[str, Any], *, of_messages: bool
) -> list[list[int]]:
    """Return the token ids of conversations, each ready for the assistant's answer.

    The template writes the special tokens itself, so that none is put before its text.

    Args:
      card: the target's name and tokenizer.
      conversations: their messages, by the numbers of the prompts.
      variables: what the template is given beside them.
      of_messages: whether some of them were given as messages, not as texts: what a refusal says to change.

    Raises:
      InputError: there is no tokenizer, no chat template, one that cannot be rendered or that refuses a conversation, or a text is
        not Unicode.
    """
    if not conversations:
        return []
    _check_tokenizer(card)
    instead = "change the messages" if of_messages else "leave out --chat"
    if not card.tokenizer.chat_template:
        plain = "give plain texts" if of_messages else instead
        raise InputError(f"{card.name} has no chat template; {plain}, or use an instruction-tuned model")
    try:
        texts = render(card.tokenizer, list(conversations.values()), generation_prompt=True, variables=variables)
    except Refused as error:
        said = f"refuses prompt {list(conversations)[error.at]} ({error})"
        raise InputError(f"the chat template of {card.name} {said}; {instead}") from error
    except InputError as error:
        raise InputError(f"the chat template of {card.name} {error}; {instead}, or correct the template") from error
    return encode_texts(card, texts, special=False)


def _check_tokenizer(card):
    if card.tokenizer is None:
        raise InputError(f"{card.name} has no tokenizer; put its tokenizer.json beside config.json, or give token ids")


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


class Refused(InputError):
    """A template's own refusal of the conversation at a place."""

    def __init__(self, said: str, at: int):
        super().__init__(said)
        self.at = at


def render(
    tokenizer, conversations: list[list[Message]], *, generation_prompt: bool, variables: Mapping[str, Any] = MappingProxyType({})
) -> list[str]:
    """Return the text that a tokenizer's chat template makes of each conversation.

    Raises:
      Refused: the template raises an exception of its own, as for roles that it does not take.
      InputError: what the template does that it may not, without saying whose it is.
    """
    if len(tokenizer.chat_template) > LARGEST_TEMPLATE:
        raise InputError(f"is longer than {LARGEST_TEMPLATE:,} characters")
    given = dict(variables)
    size = max(len(json.dumps(messages)) for messages in conversations) + len(json.dumps(given))
    request = {
        "path": [folder for folder in sys.path if os.path.isabs(folder)],  # "" is wherever the process is, such as in the folder
        "template": tokenizer.chat_template,
        "conversations": conversations,
        "variables": dict(tokenizer.special_tokens_map) | given | {"add_generation_prompt": generation_prompt},
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
    if "refused" in answer:
        raise Refused(printable(answer["refused"]) or "no reason given", answer["at"])
    if "error" in answer:
        raise InputError(f"cannot be rendered ({printable(answer['error'])})")
    return answer["texts"]
