"""`cache_folder`: where what can be made again is kept for a user."""

import os
import pathlib


def cache_folder(kind: str) -> pathlib.Path:
    """Return the folder for one kind of thing in the user's cache: $XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "mlspecqd-jax" / kind
