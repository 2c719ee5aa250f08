"""The demo family's sources: which files are read, whose they are, and under which licence."""

import hashlib
import importlib.metadata
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# Installed with this project and its test extra, each under an Apache, BSD or MIT licence.
PACKAGES = (
    "absl-py aiofiles anyio click etils filelock flax fsspec h11 httpcore2 httpx2 huggingface-hub humanize jax jinja2 "
    "markdown-it-py numpy opt-einsum optax orbax-checkpoint packaging pluggy psutil pytest rich scipy simplejson transformers "
    "treescope typer"
).split()
PERMISSIVE, OTHER = re.compile(r"\b(Apache|BSD|MIT)\b"), re.compile(r"GPL|MPL")
MOST_BYTES = 14_000_000  # of one package: some have as much source as all others together
MOST_DIGITS = 0.1  # of a file's characters: more is a table of numbers
# Tests are long lists of cases, `encodings` tables of characters, `pydoc_data` one manual: none shows what code looks like. What
# a package carries of others may be under another licence.
SKIPPED_FOLDERS = set(
    "site-packages dist-packages __pycache__ test tests idle_test encodings pydoc_data _external _vendor _vendored vendored".split()
)
SKIPPED_FILES = re.compile(r"_sysconfigdata|test_|.*_test\.py$")  # the first is written when Python is built


class Source(NamedTuple):
    """One document; `name` is its path below the root it was found in."""

    name: str
    text: str
    sha256: str


class Origin(NamedTuple):
    """Where documents come from."""

    name: str
    version: str
    licence: str
    sources: list[Source]


def standard_library() -> Origin:
    """Return the source of the Python that runs this."""
    return folder(Path(sysconfig.get_paths()["stdlib"]))._replace(
        name="Python standard library", version=platform.python_version(), licence="PSF-2.0"
    )


def folder(root: Path) -> Origin:
    """Return the .py files below a folder, sorted by path."""
    paths = sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix())
    return Origin(root.name, "", "", list(_read((p.relative_to(root).as_posix(), p) for p in paths)))


def package(name: str) -> Origin:
    """Return the .py files of an installed package, sorted by path; of a large one, those whose content's hash is least.

    Raises:
      ValueError: it is not installed, or under a licence that does not say Apache, BSD or MIT.
    """
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"the package {name} is not installed; install this project with its test extra.") from error
    licence = licence_of(found.metadata)
    if not PERMISSIVE.search(licence) or OTHER.search(licence):
        raise ValueError(f"the package {name} is under the licence {licence!r}, not Apache, BSD or MIT; leave it out.")
    files = sorted((f.as_posix(), f.locate()) for f in found.files or [] if f.suffix == ".py" and ".." not in f.parts)
    kept, room = set(), MOST_BYTES
    sources = list(_read(files))
    for source in sorted(sources, key=lambda s: s.sha256):
        room -= len(source.text.encode())
        if room < 0:
            break
        kept.add(source.sha256)
    return Origin(name, found.version, licence, [s for s in sources if s.sha256 in kept])


def licence_of(metadata) -> str:
    """Return what a package's metadata says of its licence, in one line: the expression, the classifiers, or the text's start."""
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    text = (metadata.get("License") or "").strip()
    return metadata.get("License-Expression") or ", ".join(classifiers) or " ".join(text.split())[:80] or "unknown"


def without_duplicates(origins: Iterable[Origin]) -> list[Origin]:
    """Return the origins with each content once, where it comes first."""
    seen, result = set(), []
    for origin in origins:
        first = {s.sha256: s for s in reversed(origin.sources) if s.sha256 not in seen}
        seen |= first.keys()
        result.append(origin._replace(sources=[s for s in origin.sources if first.get(s.sha256) is s]))
    return result


def _read(files: Iterable[tuple[str, Path]]) -> Iterator[Source]:
    """Yield the documents that show what code looks like, with Unix line ends."""
    for name, path in files:
        *folders, file = name.split("/")
        if SKIPPED_FOLDERS & set(folders) or SKIPPED_FILES.match(file):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if text.strip() and sum(c.isdigit() for c in text) <= MOST_DIGITS * len(text):
            yield Source(name, text, hashlib.sha256(text.encode("utf-8")).hexdigest())
