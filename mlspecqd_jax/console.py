"""Writing to stdout and stderr, whatever a shell made of them: closed, full, of another encoding, or left by their reader."""

import errno
import io
import os
import sys

from mlspecqd_jax.errors import InputError


def prepare() -> None:
    """Give up streams that are closed, and escape what a stream's encoding cannot spell."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")


def put(text: str) -> None:
    """Write to stdout, at once.

    Raises:
      BrokenPipeError: its reader left.
      InputError: it takes no more.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise InputError(f"the output cannot be written ({error.strerror}); check where stdout goes") from error


def say(text: str, end: str = "\n") -> None:
    """Write to stderr, at once; nothing depends on whether anyone reads it."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EBADF):
            raise
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def drop_output() -> None:
    """Send what is still to come on stdout nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
