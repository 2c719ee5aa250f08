"""`kept_value`: what takes its time to find out and is always the same, kept on disk for later processes."""

import hashlib
import importlib.metadata
import os
import pickle
from collections.abc import Callable
from typing import Any

import jax

from mlspecqd_jax.fingerprints import source
from mlspecqd_jax.user_cache import cache_folder, read_own, write_own

JAX_KIND = "xla"  # of the folder of jax's own cache


def keeping() -> bool:
    """Return whether things are kept: where jax keeps its programs in this package's folder (`models.enable_compilation_cache`)."""
    ours = jax.config.values["jax_compilation_cache_dir"] == str(cache_folder(JAX_KIND))
    return ours and bool(jax.config.values["jax_enable_compilation_cache"]) and os.name == "posix"


def kept_value(kind: str, facts: Any, by: str, make: Callable[[], Any]) -> Any:
    """Return make(), or what an earlier process kept of it.

    Args:
      kind: of the folder in the user's cache, which must be one of `models.KINDS`.
      facts: all that it depends on beside this package's source, spelled alike by repr in every process.
      by: the distribution that finds it out, on whose version it depends too.
      make: gives a value that pickle knows.
    """
    if not keeping():
        return make()
    name = hashlib.sha256(repr((facts, source(), importlib.metadata.version(by))).encode()).hexdigest()
    path = cache_folder(kind) / name
    found = read_own(path, name)
    if found is not None:
        try:
            return pickle.loads(found)  # nobody else can have written it
        except Exception:  # whatever pickle raises
            pass
    value = make()
    write_own(path, name, pickle.dumps(value))
    return value
