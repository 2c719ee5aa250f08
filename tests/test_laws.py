"""The laws of docs/laws.md: every citation is there, and every one is cited by a test."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
WHERE = ("mlspecqd_jax", "pallas_kernels", "cpu_kernels", "tests", "examples", "benchmarks")
CITATION = re.compile(r"\b[Ll]aws? ((?:\d+(?:, | and |-))*\d+)\b|\bC(\d+)\b(?!\d)")


def cited(text: str) -> set[str]:
    """Return the laws ("5") and contracts ("C5") that a text cites."""
    found = set()
    for laws, contract in CITATION.findall(text):
        found |= {f"C{contract}"} if contract else expanded(laws)
    return found


def expanded(laws: str) -> set[str]:
    found = set()
    for part in re.split(", | and ", laws):
        first, _, last = part.partition("-")
        found |= {str(n) for n in range(int(first), int(last or first) + 1)}
    return found


def stated() -> set[str]:
    text = (ROOT / "docs" / "laws.md").read_text(encoding="utf-8")
    return {law or contract for law, contract in re.findall(r"^\*\*(?:Law (\d+)|(C\d+)) \(", text, re.MULTILINE)}


def sources(*folders: str):
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != pathlib.Path(__file__).name:
                yield path


@pytest.mark.parametrize("path", list(sources(*WHERE)), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_cited_is_stated(path):
    assert cited(path.read_text(encoding="utf-8")) <= stated()


def test_what_is_stated_is_cited():
    everywhere = set().union(*(cited(path.read_text(encoding="utf-8")) for path in sources("tests")))
    assert stated() - everywhere == set()
    assert len(stated()) >= 19


def test_citations_are_read():
    assert cited("Laws 1, 3-5 and 7, law 8 (C9, C10); no LAW 11") == {"1", "3", "4", "5", "7", "8", "C9", "C10"}
    assert cited("def rows(C): C4x") == set()
