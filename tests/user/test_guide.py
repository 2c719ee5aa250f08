"""The guide's table of arguments is the one that checks them."""

import pathlib

from mlspecqd_jax.arguments import ARGUMENTS

GUIDE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "guide.md"


def test_the_guide_tells_every_argument_as_it_is_checked():
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    first = lines.index("| argument | a number must be | |") + 2
    rows = [f"| `{name}` | {a.number.needed if a.number else ''} | {a.words} |" for name, a in ARGUMENTS.items()]
    assert lines[first : first + len(rows) + 1] == [*rows, ""]
