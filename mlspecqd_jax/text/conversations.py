"""Conversations: lists of messages, as a chat template takes them; what is none is refused by its place."""

import json
from collections.abc import Mapping
from typing import Any

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError

Message = dict[str, Any]  # a role, a content, and what else a template knows of, such as tool_calls
NEEDED = "an object with a role and a content"
OURS = ("messages", "add_generation_prompt")  # what a template is always given


def is_conversation(prompt: Any) -> bool:
    """Return whether a prompt is meant as a list of messages."""
    return isinstance(prompt, (list, tuple)) and any(isinstance(entry, Mapping) for entry in prompt)


def holds_conversations(prompts: Any) -> bool:
    """Return whether prompts are a conversation or have one among them."""
    return is_conversation(prompts) or (isinstance(prompts, (list, tuple)) and any(map(is_conversation, prompts)))


def conversation(prompt: list | tuple, number: int) -> list[Message]:
    """Return the messages of a prompt of this number, each content one text.

    A content may be a list of parts of type text, as of clients that also send images: they are joined by newlines. A message that
    calls tools needs none.

    Raises:
      InputError: a message is of another shape; which, and what it needs.
    """
    return [_message(entry, f"prompt {number}, message {j}") for j, entry in enumerate(prompt)]


def variables(given: Any) -> dict[str, Any]:
    """Return what `chat_template_kwargs` gives to a template, by name.

    Raises:
      InputError: it is no mapping from names to what JSON can say, or names what is always given.
    """
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InputError(f"chat_template_kwargs is {brief(given)}, but must be a mapping from names that the chat template knows")
    ours = next((name for name in OURS if name in given), None)
    if ours is not None:
        raise InputError(f"chat_template_kwargs names {ours}, which the prompts decide; leave it out")
    return _as_json(dict(given), "chat_template_kwargs")


def _message(entry: Any, place: str) -> Message:
    if not isinstance(entry, Mapping):
        raise InputError(f"{place} is {brief(entry)}, but must be {NEEDED}")
    role = entry.get("role")
    if not isinstance(role, str) or not role:
        said = "has no role" if role is None else f"has the role {brief(role)}"
        raise InputError(f"{place} {said}, but needs a text such as user, assistant, system or tool")
    message = _as_json(dict(entry), place)
    if entry.get("content") is not None:
        return message | {"content": _text(entry["content"], place)}
    if not entry.get("tool_calls"):
        raise InputError(f"{place} has no content, but must be {NEEDED}")
    return message


def _text(content: Any, place: str) -> str:
    """Return a content as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(f"{place} has the content {brief(content)}, but needs a text, or a list of parts of type text")
    for j, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InputError(f'{place}, part {j} of the content is {brief(part)}, but must be {{"type": "text", "text": ...}}')
    return "\n".join(part["text"] for part in content)


def _as_json(value: dict, place: str) -> dict:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{place} holds what JSON cannot say ({brief(str(error))}); give texts, numbers, lists and objects"
        ) from None
