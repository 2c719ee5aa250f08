"""What may be asked of a generation, and its checks: prompts to a batch, arguments to a sampling, all before any tracing.

Notation: B batch, S buffer length.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mlspecqd_jax import jax_settings
from mlspecqd_jax.arguments import ARGUMENTS, LARGEST_INT, each_row, flag, instance, texts
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.speculation import loop
from mlspecqd_jax.speculation.control import Fixed
from mlspecqd_jax.speculation.protocols import Control
from mlspecqd_jax.speculation.settings import Sampling
from mlspecqd_jax.speculation.stack import Stack, outermost
from mlspecqd_jax.text.card import Card
from mlspecqd_jax.text.conversations import holds_conversations
from mlspecqd_jax.text.detokenizer import encode

DEFAULT_NEW_TOKENS = 128
PREFILL_WIDTHS = (16, 64, loop.PREFILL_WIDTH)


class Batch(NamedTuple):
    """Prompts as the pure functions take them."""

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]
    limit: jax.Array  # int32 [B], final lengths
    prefill_width: int  # static


@jax_settings.held
def prepare(
    stack: Stack,
    prompts,
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Batch:
    """Encode prompts and lay them out in a buffer whose size is a bucket, so that another prompt is rarely another trace.

    Args:
      stack: from `stack`.
      prompts: a text; a conversation, a list of messages such as {"role": "user", "content": "Hi"}; a list or tuple of texts, of
        conversations and of token ids (lists, tuples or integer arrays); or an integer array of a row a prompt. Nothing else is
        iterated: make a list of what a generator yields.
      max_new_tokens: at most this many new tokens, one number or one a row; None is 128, or what the positions leave.
      chat: wrap each text as a user's message by the tokenizer's chat template; a conversation among the prompts implies it.
      chat_template_kwargs: what the template is given beside the messages, such as {"enable_thinking": False} or tools.

    Raises:
      InputError: a prompt is empty, or prompt and new tokens exceed the positions of the target or of a draft.
    """
    card = card_of(stack)
    rows = encode(card, prompts, chat=flag("chat", chat), chat_template_kwargs=chat_template_kwargs)
    explicit = max_new_tokens is not None
    wanted = each_row("max_new_tokens", max_new_tokens if explicit else DEFAULT_NEW_TOKENS, len(rows))
    wanted = np.array([min(n, LARGEST_INT) for n in wanted], np.int64)
    length = np.array([len(row) for row in rows], np.int64)
    if np.any(length >= card.max_positions):
        raise InputError(
            f"a prompt has {max(length)} tokens, but {card.name} has {card.max_positions} positions and needs one for a new token; "
            "shorten the prompt"
        )
    limit = length + wanted
    if explicit and np.any(limit > card.max_positions):
        worst = np.argmax(limit)
        raise InputError(
            f"{length[worst]} prompt tokens and {limit[worst] - length[worst]} new tokens exceed the {card.max_positions} "
            f"positions of {card.name}; lower max_new_tokens or shorten the prompt"
        )
    limit = np.minimum(limit, card.max_positions)
    for draft in stack.cards[1:]:
        if limit.max() > draft.max_positions:
            raise InputError(
                f"{draft.name} has {draft.max_positions} positions, but prompt and new tokens take {limit.max()}; "
                "lower max_new_tokens or draft with a model of more positions"
            )
    tokens = np.zeros((len(rows), loop.buffer_length(int(limit.max()))), np.int32)
    for r, row in enumerate(rows):
        tokens[r, : len(row)] = row
    width = next((w for w in PREFILL_WIDTHS if w >= length.max() - 1), PREFILL_WIDTHS[-1])
    return Batch(*jax.device_put((tokens, length.astype(np.int32), limit.astype(np.int32))), width)


def card_of(stack: Stack) -> Card:
    """Return the target's card: what generating from text needs to know of it."""
    outermost(stack)
    card = stack.card if isinstance(stack, Stack) else None
    return instance("the stack's card", card, Card, "one of name, tokenizer and positions: build the stack with mlsd.stack")


class Request(NamedTuple):
    """What is asked, checked."""

    batch: Batch
    sampling: Sampling
    control: Control
    stops: tuple[str, ...]  # strings at whose first text ends


def request(stack: Stack, prompts, arguments: dict[str, Any]) -> Request:
    """Check prompts and all arguments."""
    unknown = sorted(arguments.keys() - ARGUMENTS.keys())
    if unknown:
        raise InputError(f"'{unknown[0]}' is not supported; supported: {', '.join(sorted(ARGUMENTS))}")
    card, stops = card_of(stack), texts("stop", arguments.pop("stop", None))
    if stops and card.tokenizer is None:
        raise InputError(f"{card.name} has no tokenizer, which stop strings need; use stop_token_ids")
    batch_arguments = {
        name: arguments.pop(name) for name in ("max_new_tokens", "chat", "chat_template_kwargs") if name in arguments
    }
    batch = prepare(stack, prompts, **batch_arguments)
    if arguments.get("stop_token_ids") is None:
        ends = card.chat_end_token_ids if batch_arguments.get("chat") or holds_conversations(prompts) else ()
        arguments["stop_token_ids"] = tuple(dict.fromkeys((*card.eos_token_ids, *ends)))
    rows, limit = len(batch.length), {name: arguments.pop(name) for name in ("draft_limit",) if name in arguments}
    sampling = Sampling.create(rows, stack.level.model.vocab_size, **arguments)
    loop.check(stack, sampling)
    fixed = Fixed.create(rows, **limit)
    control = fixed if stack.control is None else stack.control.capped(fixed.draft_limit)
    return Request(batch, sampling, control, stops)
