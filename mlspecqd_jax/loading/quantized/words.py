"""What configs of quantization say, taken only as the values that are known."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError


def one_of(config: Mapping[str, Any], key: str, allowed: Sequence[Any], otherwise: Any = None) -> Any:
    """Return a key's value, or `otherwise` where it is absent or null.

    Raises:
      InputError: it is none of those allowed.
    """
    value = config.get(key)
    value = otherwise if value is None else value
    if not any(value == known and type(value) is type(known) for known in allowed):
        listed = ", ".join(str(known) for known in allowed if known is not None)
        raise InputError(f"{key} is {brief(value)}, which is not read; {listed} {'is' if len(allowed) == 1 else 'are'}")
    return value


def table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the object under a key, an empty one where it is absent or null.

    Raises:
      InputError: it is something else.
    """
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{key} is {brief(value)}, but must be an object")
    return value
