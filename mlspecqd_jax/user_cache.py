"""What can be made again and is kept for a user: where, and reading and writing what nobody else could have written."""

import contextlib
import hashlib
import os
import pathlib
import stat
import tempfile

MOST_BYTES = 2**30  # that files of one kind take, beyond which the ones go that were not read for longest


def cache_folder(kind: str) -> pathlib.Path:
    """Return the folder for one kind of thing in the user's cache: $XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "mlspecqd-jax" / kind


def why_not_own(folder: pathlib.Path) -> str | None:
    """Return why a folder of `cache_folder`, which is made if it is not there, is not this user's alone to write; None if it is."""
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True)
            status = os.stat(each)
            if status.st_uid == os.getuid() and status.st_mode & stat.S_IWGRP and not status.st_mode & stat.S_IWOTH:
                each.chmod(stat.S_IMODE(status.st_mode) & ~stat.S_IWGRP)  # as folders are made where each user has a group
            if not _is_own(os.stat(each)):
                return f"{each} belongs to somebody else, or others may write there"
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"


def read_own(path: pathlib.Path, name: str) -> bytes | None:
    """Return what `write_own` wrote by this name; None if there is nothing, or something else, or others may have written it."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    with open(file, "rb") as opened:
        if not _is_own(os.fstat(file)) or not _is_own(os.stat(path.parent)):
            return None
        found = opened.read()
    head, data = found[: len(_head(name, b""))], found[len(_head(name, b"")) :]
    if head != _head(name, data):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return data


def write_own(path: pathlib.Path, name: str, data: bytes) -> None:
    """Write a file all at once, so that nobody reads half of it; what cannot be written is not kept."""
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            try:
                file.write(_head(name, data) + data)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        _drop_oldest(path.parent)


def _head(name: str, data: bytes) -> bytes:
    return b"mlspecqd\n" + b"".join(hashlib.sha256(part).hexdigest().encode() + b"\n" for part in (name.encode(), data))


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _drop_oldest(folder: pathlib.Path) -> None:
    files = sorted(((file.stat(), file) for file in folder.iterdir()), key=lambda pair: pair[0].st_mtime)
    total = sum(status.st_size for status, _ in files)
    for status, file in files:
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= status.st_size
