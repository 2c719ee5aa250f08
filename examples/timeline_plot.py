"""Draws what `timeline.py` recorded: lanes of passes with drafts rising between them, plain decoding below, and the text."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image

GREY, LIGHT = "#5a5a5a", "#cfcfcf"
# Of a palette that the colour-blind tell apart; places and marks say the same.
LANES, ACCEPTED, REJECTED = ("#0072B2", "#56B4E9", "#E69F00", "#CC79A7"), "#009E73", "#D55E00"
HIGH = 0.36  # of a box, where lanes are 1 apart
SIZE, CHARACTER = 8, 0.602  # of the text in points, and of a character of it in that size


def draw(run, plain, prompt: str, decoded: list[str], how: str, stem: Path) -> list[Path]:
    """Write the plot as PNG and SVG beside each other; return their paths."""
    heights = [0.8 * len(run.names) + 0.2, 0.6, 0.165 * rows(prompt, decoded)]
    style = {"font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "timeline"}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(10, sum(heights) + 1.45), layout="constrained")
        upper, middle, lower = figure.subplots(3, 1, height_ratios=heights)
        most = 1e3 * max(run.seconds, plain.seconds) * 1.1
        strip(upper, run, most)
        strip(middle, plain, most)
        upper.tick_params(labelbottom=False)
        middle.set_xlabel("milliseconds")
        lower.axis("off")
        ratio = plain.seconds_unlogged / run.seconds_unlogged
        title(upper, f"with drafts: {spent(run)} ({ratio:.2f} x)")
        title(middle, f"plain decoding: {spent(plain)}")
        upper.set_title(how, loc="right", color=GREY, fontsize=9)
        figure.legend(handles=keys(run.names), loc="outside lower center", ncols=6, frameon=False)
        figure.draw_without_rendering()  # lays it out, so that the text knows its width
        text(lower, prompt, decoded, origins(run.passes))
        paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
        plt.close(figure)
    Image.open(paths[0]).convert("RGB").quantize(64).save(paths[0], optimize=True)  # flat colours need no more
    return paths


def spent(run) -> str:
    """Return the passes of each level and the seconds, as drawn and without the log."""
    counts = [sum(p.depth == depth for p in run.passes) for depth in range(len(run.names))]
    names = ["target", "draft", *["draft below"] * len(counts)]
    passes = ", ".join(
        f"{n}{'' if i else ' passes'} of the {name}" for i, (n, name) in enumerate(zip(counts, names, strict=False)) if n
    )
    return f"{passes}; {run.seconds:.2f} s, unwatched {run.seconds_unlogged:.2f} s"


def title(axis, words: str) -> None:
    axis.set_title(words, loc="left", fontweight="bold")


def strip(axis, run, most: float) -> None:
    """Draw a lane a level, the target's on top; the boxes are its passes, and what rises to them are drafted tokens."""
    top = len(run.names) - 1
    drafted: dict[int, list[float]] = {}  # depth -> when each token was put out that has not been judged yet
    for p in run.passes:
        began, ended, lane = 1e3 * p.began, 1e3 * p.ended, top - p.depth
        axis.add_patch(Rectangle((began, lane - HIGH / 2), ended - began, HIGH, color=LANES[p.depth % 4], linewidth=0))
        times = drafted.pop(p.depth + 1, [])
        if not times and p.depth < top:  # what drafts has no passes, and next to no time
            times = [began] * len(p.draft)
            axis.plot(began, lane - 1, "D", color=LANES[top % 4] if p.draft else LIGHT, markersize=4 if p.draft else 2.5)
        at = [began + (j + 0.5) / len(p.draft) * (ended - began) for j in range(len(p.draft))]
        rise(axis, times[: p.accepted], at[: p.accepted], lane, ACCEPTED, "o", "-")
        rise(axis, times[p.accepted : len(at)], at[p.accepted :], lane, REJECTED, "x", ":")
        drafted.setdefault(p.depth, []).extend([ended] * len(p.appended))
        if p.depth == 0 and top:
            axis.text((began + ended) / 2, lane + HIGH / 2 + 0.06, f"+{len(p.appended)}", ha="center", fontsize=8.5)
    axis.text(1e3 * run.passes[-1].ended + most / 150, top, f"{len(run.new)} tokens", va="center")
    axis.set_xlim(0, most)
    axis.set_ylim(-0.3, top + (0.5 if top else 0.3))
    axis.set_yticks(range(top + 1), labels(run.names, "\n")[::-1])
    axis.tick_params(axis="y", left=False)
    axis.spines[["top", "right", "left"]].set_visible(False)


def rise(axis, times: list[float], at: list[float], lane: int, colour: str, mark: str, line: str) -> None:
    """Draw tokens drafted at these times on the lane below, rising to where they are judged."""
    y = lane - HIGH / 2 - 0.07
    pairs = list(zip(times, at, strict=True))
    xs, ys = [x for pair in pairs for x in (*pair, None)], [lane - 1 + HIGH / 2, y, None] * len(pairs)
    axis.plot(xs, ys, line, color=colour, linewidth=0.7)
    axis.plot(at, [y] * len(at), mark, color=colour, markersize=2.8 if mark == "o" else 3.4)


def origins(passes: list) -> list[int]:
    """Return for each new token the depth of what first proposed it: 0 is the target itself."""
    put_out: dict[int, list[int]] = {}
    for p in passes:
        below = put_out.pop(p.depth + 1, None) or [p.depth + 1] * len(p.draft)
        own = [p.depth] * (len(p.appended) - p.accepted)
        put_out.setdefault(p.depth, []).extend(below[: p.accepted] + own)
    return put_out[0]


def rows(prompt: str, decoded: list[str]) -> int:
    """Return how many lines the text takes, its head included."""
    return 2 + max(prompt.count("\n"), "".join(decoded).count("\n"))


def text(axis, prompt: str, decoded: list[str], origin: list[int]) -> None:
    """Write the prompt and, beside it, the new tokens, each on the colour of what proposed it; a unit is a character."""
    wide = axis.get_window_extent().width / axis.figure.dpi * 72 / (SIZE * CHARACTER)
    axis.set(xlim=(0, wide), ylim=(-rows(prompt, decoded), 0))
    font = {"family": "monospace", "fontsize": SIZE, "va": "center_baseline"}
    for x, head in ((0, "the prompt"), (wide / 2, "the text, each token on the colour of what proposed it (¶ ends a line)")):
        axis.text(x, -0.5, head, color=GREY, fontsize=8.5, va="center_baseline")
    for i, line in enumerate(prompt.split("\n")):
        axis.text(0, -1.5 - i, line[: int(wide / 2)], **font)
    x, y = wide / 2, -1.5
    for token, depth in zip(decoded, origin, strict=True):
        for i, piece in enumerate(token.replace("\n", "¶\n").split("\n")):
            if i:
                x, y = wide / 2, y - 1
            axis.add_patch(Rectangle((x + 0.06, y - 0.42), max(len(piece) - 0.12, 0), 0.84, color=LANES[depth % 4], linewidth=0))
            if piece.strip():
                blank = len(piece) - len(piece.lstrip())
                axis.text(x + blank, y, piece.strip(), color="black" if depth else "white", **font)
            x += len(piece)


def labels(names: list[str], between: str = " ") -> list[str]:
    """Return what levels are called, from their models' names."""
    return [f"its twin,{between}{name.partition('@')[2].upper()}" if own(name, names) else short(name, between) for name in names]


def own(name: str, names: list[str]) -> bool:
    """Return whether a draft is a twin of the target."""
    return "@" in name and name.partition("@")[0] == names[0]


def short(name: str, between: str) -> str:
    """Return a model's name without its folder, on two lines where it is long."""
    first, dash, rest = Path(name).name.partition("-")
    return f"{first}{dash}{between.strip(' ') if len(first) > 4 else ''}{rest}"


def keys(names: list[str]) -> list:
    """Return the legend's entries."""
    marks = [
        Line2D([], [], color=ACCEPTED, marker="o", markersize=3.5, linewidth=0.8, label="drafted and accepted"),
        Line2D([], [], color=REJECTED, marker="x", markersize=4, linewidth=0.8, linestyle=":", label="drafted in vain"),
    ]
    return marks + [Patch(color=LANES[i % 4], label=name) for i, name in enumerate(labels(names))]
