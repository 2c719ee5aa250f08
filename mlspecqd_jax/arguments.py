"""What every argument may be, in two tables, and the sentences that refuse anything else before it is traced or iterated.

A sentence says what was given and what is needed. Nothing is converted on the way: a bool is no number and a number no text. Arrays
of numpy and jax are taken where a list of numbers is, traced ones only where a function can be called inside `jax.jit`.
"""

import dataclasses
import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias, TypedDict, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mlspecqd_jax.errors import InputError

LARGEST, LEAST = (float(x) for x in (np.finfo(np.float32).max, np.finfo(np.float32).tiny))
LARGEST_INT = int(np.iinfo(np.int32).max)
ROWS = 2**24  # more than this of anything is a mistake


@dataclasses.dataclass(frozen=True)
class Number:
    """What a number may be; `needed` says in words what `lawful` tests."""

    needed: str
    lawful: Callable[[Any], bool]
    whole: bool = False


def _whole(needed: str, least: int, most: float = math.inf) -> Number:
    return Number(needed, lambda x: least <= x <= most, whole=True)


class Argument(NamedTuple):
    """What is told of an argument of a generation, wherever it is told."""

    words: str  # what it does, and its default
    number: Number | None = None  # what it may be, or each entry of it, if it is a number
    letter: str | None = None  # what stands for one number on the command line; None where it is spelt there in another way


Numbers: TypeAlias = float | Sequence[float]
Wholes: TypeAlias = int | Sequence[int]

NEW_TOKENS = Argument("new tokens, at most; default 128, or what the positions leave", _whole("a positive whole number", 1), "N")
CHAT = Argument("wrap each prompt, as a user's message, by the model's chat template")
CHAT_KWARGS = Argument('what its chat template is given beside the messages, such as {"enable_thinking": false}')
TEMPERATURE = Argument("default 0", Number("0 (greedy) or more", lambda x: 0 <= x <= LARGEST), "T")
TOP_K = Argument("keep the likeliest so many; default 0", _whole("0 (off) or a positive whole number", 0), "K")
TOP_P = Argument("keep the likeliest of this mass; default 1", Number("more than 0 and at most 1 (off)", lambda x: 0 < x <= 1), "P")
MIN_P = Argument("keep what has this share of the best; default 0", Number("between 0 (off) and 1", lambda x: 0 <= x <= 1), "P")
SEED = Argument("row r of a batch uses S + r; default 0", _whole("a whole number from 0 to 2**32 - 1", 0, 2**32 - 1), "S")
REPETITION = Argument("for prompt and text; default 1", Number("positive (1 is off)", lambda x: LEAST <= x <= LARGEST), "R")
PRESENCE = Argument("for new text; default 0", Number("a finite number (0 is off)", lambda x: abs(x) <= LARGEST), "P")
FREQUENCY = Argument("for each time in new text; default 0", Number("a finite number (0 is off)", lambda x: abs(x) <= LARGEST), "P")
DRAFT_LIMIT = Argument("drafted tokens a round, at most; default all", _whole("0 (no drafts) or a positive whole number", 0), "N")
RULE = Argument("coupled (default) or rejection: which noise sampling uses")
STOP = Argument("end before this text, which may hold special tokens; repeatable")
STOP_IDS = Argument(
    "end a row after this token; repeatable; given once, these ids replace the model's own end-of-text ids",
    _whole("a token id (a whole number of at least 0)", 0, LARGEST_INT),
)
BIAS = Argument(
    "add a value to the logit of a token (-inf bans it); repeatable",
    Number("a finite number, or -inf to ban the token", lambda x: abs(x) <= LARGEST or x == -math.inf),
)
LOGPROBS = Argument("tell the log-probability of each new token under the model's own logits")
COINS = Argument(
    "for benchmarks: coins accept drafts, at one rate for each level that judges, outermost first; the text is meaningless",
    Number("a probability from 0 to 1 for each level that judges", lambda x: 0 <= x <= 1),
)


class Arguments(TypedDict, total=False):
    """What may be asked of a generation; anything else is refused by name. A sequence of numbers gives one to each row."""

    max_new_tokens: Annotated[Wholes | None, NEW_TOKENS]
    chat: Annotated[bool, CHAT]
    chat_template_kwargs: Annotated[Mapping[str, Any] | None, CHAT_KWARGS]
    temperature: Annotated[Numbers, TEMPERATURE]
    top_k: Annotated[Wholes, TOP_K]
    top_p: Annotated[Numbers, TOP_P]
    min_p: Annotated[Numbers, MIN_P]
    seed: Annotated[Wholes, SEED]
    repetition_penalty: Annotated[Numbers, REPETITION]
    presence_penalty: Annotated[Numbers, PRESENCE]
    frequency_penalty: Annotated[Numbers, FREQUENCY]
    draft_limit: Annotated[Wholes, DRAFT_LIMIT]
    rule: Annotated[str, RULE]
    stop: Annotated[str | Sequence[str] | None, STOP]
    stop_token_ids: Annotated[Collection[int] | None, STOP_IDS]
    logit_bias: Annotated[Mapping[int, float] | Sequence[Mapping[int, float]] | None, BIAS]
    logprobs: Annotated[bool, LOGPROBS]
    synthetic_acceptance: Annotated[Sequence[float] | None, COINS]


def _told(hint: Any) -> Argument:
    (argument,) = hint.__metadata__
    return argument


ARGUMENTS: Mapping[str, Argument] = {name: _told(hint) for name, hint in get_type_hints(Arguments, include_extras=True).items()}

# By name of the argument; of a sequence, what each entry may be.
NUMBERS = {name: argument.number for name, argument in ARGUMENTS.items() if argument.number} | {
    "bits": Number("a number of more than 0 and at most 32", lambda x: 0 < x <= 32),
    "batch": _whole(f"a whole number from 1 to {ROWS}", 1, ROWS),
    "vocab_size": _whole(f"a whole number from 1 to {ROWS}", 1, ROWS),
    "longest": _whole("a whole number from 0 to 2**30", 0, 2**30),
    "multiple": _whole("a whole number from 1 to 2**30", 1, 2**30),
    "prefill_width": _whole("a positive whole number", 1, LARGEST_INT),
    "max_ngram": _whole("a whole number from 1 to 64", 1, 64),
    "min_ngram": _whole("a whole number from 1 to 64", 1, 64),
    "rounds": _whole("a whole number from 0 to 2**31 - 1", 0, LARGEST_INT),
    "limit": _whole("a whole number from 0 to 2**31 - 1", 0, LARGEST_INT),
}


def number(name: str, value: Any) -> int | float:
    """Return a number if it is one that the table allows, or raise an InputError."""
    kind = NUMBERS[name]
    refusal = InputError(f"{name} is {brief(value)}, but must be {kind.needed}")
    if is_array(value) and value.ndim == 0:
        value = _listed(value)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral if kind.whole else numbers.Real):
        raise refusal
    try:
        value = operator.index(value) if kind.whole else float(value)
    except OverflowError:
        raise refusal from None
    if not kind.lawful(value):
        raise refusal
    return value


def whole(name: str, value: Any) -> int:
    """Return `number`, where the table allows whole ones alone."""
    return int(number(name, value))


def sequence(name: str, value: Any, most: int | None = None) -> list | None:
    """Return the numbers of a list, tuple, range or array [n], not yet checked, or None for anything else.

    Raises:
      InputError: there are more than `most`.
    """
    if not isinstance(value, (list, tuple, range)) and not (is_array(value) and value.ndim == 1):
        return None
    if most is not None and len(value) > most:
        raise InputError(f"{name} has {len(value)} entries, but can have at most {most}")
    return _listed(value) if is_array(value) else list(value)


def each_row(name: str, value: Any, rows: int) -> list[int | float]:
    """Return one checked number a row, from one for all rows or from a sequence of one for each."""
    given = sequence(name, value, ROWS)
    if given is None and is_array(value) and value.ndim > 1:
        raise InputError(f"{name} has shape {list(value.shape)}, but must be a number or one for each of {rows} rows")
    if given is None:
        return [number(name, value)] * rows
    if len(given) != rows:
        raise InputError(f"{name} has {len(given)} entries, but must be a number or one for each of {rows} rows")
    return [number(name, entry) for entry in given]


def flag(name: str, value: Any) -> bool:
    """Return a bool that is one, or raise an InputError."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} is {brief(value)}, but must be True or False")
    return bool(value)


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return a text that is one of those allowed, or raise an InputError."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name} is {brief(value)}, but must be one of {', '.join(allowed)}")
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Return texts from one, several or None, or raise an InputError where one is empty or none."""
    given = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(text, str) and text for text in given):
        raise InputError(f"{name} is {brief(value)}, but must be a non-empty text or a list of them")
    return tuple(given)


def instance(name: str, value: Any, kind: type, needed: str) -> Any:
    """Return a value of a type, or raise an InputError that says how to come by one."""
    if not isinstance(value, kind):
        raise InputError(f"{name} is {brief(value)}, but must be {needed}")
    return value


def recipe(format: Any, policy: Any, scale_rule: Any) -> None:
    """Raise an InputError unless these are of the types that quantizing takes; whether a format exists, `mx` checks."""
    instance("format", format, str, "the name of a format, such as mxfp4")
    instance("scale_rule", scale_rule, str, "the name of a scale rule, such as floor")
    entries = policy.items() if isinstance(policy, Mapping) else None if policy is not None else ()
    if entries is None or not all(isinstance(glob, str) and isinstance(to, (str, type(None))) for glob, to in entries):
        raise InputError(f"policy is {brief(policy)}, but must be a mapping from globs over tensor names to a format or None")


def integers(name: str, value: Any, axes: str) -> jax.Array:
    """Return an integer array, perhaps traced, that has the axes named by single letters, such as "BS"; or raise an InputError."""
    rank = len(axes)
    whole = isinstance(value, (np.ndarray, jax.Array)) and jnp.issubdtype(value.dtype, jnp.integer)
    if not whole or value.ndim != rank or 0 in value.shape:
        raise InputError(f"{name} is {brief(value)}, but must be an int32 array [{', '.join(axes)}]")
    return value


def brief(value: Any, most: int = 60) -> str:
    """Return what a message shows of a value: one line, whatever it is, and of a text at most so many characters."""
    if isinstance(value, Tracer):
        return "a traced value"
    if isinstance(value, (np.ndarray, jax.Array)):
        return f"an array of {value.dtype.name} of shape {list(value.shape)}"
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, (type(None), numbers.Number, str, bytes, list, tuple, range, set, frozenset, Mapping)):
        return f"of type {type(value).__name__}"
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = shortened.maxlong = most
    try:
        return " ".join(shortened.repr(value).split())
    except Exception:  # an int of more digits than Python writes out, or a repr of a user's class
        return f"of type {type(value).__name__}"


def is_array(value: Any) -> bool:
    """Return whether a value is a numpy or jax array whose numbers are known."""
    return isinstance(value, (np.ndarray, jax.Array)) and not isinstance(value, Tracer)


def _listed(array):
    array = np.asarray(array)
    # What numpy does not know, such as bfloat16, has no Python number of its own.
    return (array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array).tolist()
