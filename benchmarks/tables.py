"""Writes the README's tables from the JSON under benchmarks/results.

python benchmarks/tables.py            # rewrite what stands between the markers
python benchmarks/tables.py --check    # exit 1 if the README says anything else
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def startup(result: dict) -> str:
    """Return the table of start-up times."""
    lines = ["| default run | to the first text | to the end |", "|---|---|---|"]
    names = {"cold": "first ever (compiles)", "warm": "later (programs kept)"}
    for kind, name in names.items():
        first, total = result["first_text_seconds"][kind], result["total_seconds"][kind]
        lines.append(f"| {name} | {spread(first)} | {spread(total)} |")
    return "\n".join([*lines, "", source(result)])


def loading(result: dict) -> str:
    """Return the table of loading times and memory."""
    size = result["model_bytes"]
    lines = [f"| {size / 1e9:.1f} GB of BF16 weights | time | anonymous memory at most |", "|---|---|---|"]
    names = {"import": "import from safetensors", "convert": "write the converted checkpoint", "load": "load it (maps the files)"}
    for kind, name in names.items():
        lines.append(
            f"| {name} | {spread(result['seconds'][kind])} | {result['peak_anonymous_bytes'][kind] / size:.2f} x the weights |"
        )
    return "\n".join([*lines, "", source(result)])


def source(result: dict) -> str:
    """Return the line that says where a table comes from."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['cores']} cores of {result['cpu']}, {versions}; median of {result['trials']} (least to greatest); "
        f"`{result['command']}`."
    )


def spread(seconds: dict) -> str:
    """Return `median s (least to greatest)`."""
    digits = 1 if seconds["median"] >= 1 else 2
    median, least, most = (f"{seconds[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} s ({least} to {most})"


TABLES = {"startup-cpu": startup, "loading-cpu": loading}


def rewritten(readme: str) -> str:
    """Return the README with every table made anew."""
    for name, make in TABLES.items():
        table = make(json.loads((RESULTS / f"{name}.json").read_text()))
        readme, found = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m, t=table: m[1] + t + m[2], readme, flags=re.DOTALL
        )
        if not found:
            raise SystemExit(f"README.md has no place for the table {name}")
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if check:
        sys.exit(0 if rewritten(text) == text else "README.md differs from benchmarks/results; run python benchmarks/tables.py")
    path.write_text(rewritten(text), encoding="utf-8")


if __name__ == "__main__":
    main()
