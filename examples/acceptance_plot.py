"""Draws what `acceptance.py` measured: acceptance by position at each temperature, and tokens a round against their prediction."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

LEAST = 20  # judged at a position; fewer say little, and are not drawn
GREY = "#606060"
# A colour is what drafts: blue the target's own weights, the darker the more bits; orange a smaller model; green the text itself.
COLOURS = {
    "mxfp8_e4m3": "#08306b",
    "mxfp6_e2m3": "#2f7ebc",
    "mxfp4": "#86b8dd",
    "small": "#a63603",
    "small@mxfp4": "#fd8d3c",
    "ngram": "#41ab5d",
}
MARKERS = "osD^vP"


def draw(rows: list[dict], title: str, stem: Path) -> list[Path]:
    """Write the plot as PNG and SVG beside each other; return their paths."""
    temperatures = sorted({row["temperature"] for row in rows})
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "acceptance"}
    with plt.rc_context(style):
        wide = len(temperatures)
        figure, axes = plt.subplots(1, wide + 1, figsize=(2.9 * wide + 4.2, 4.5), width_ratios=[1.0] * wide + [1.2])
        for axis, temperature in zip(axes, temperatures, strict=False):
            by_position(axis, [row for row in rows if row["temperature"] == temperature])
            axis.set_title("greedy (T = 0)" if temperature == 0 else f"T = {temperature:g}", loc="left")
            axis.tick_params(labelleft=axis is axes[0])
        axes[0].set_ylabel("share accepted of the tokens judged")
        predicted(axes[-1], rows, temperatures)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.legend(handles=keys(rows), loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.13, 1, 1), w_pad=1.5)
        paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
        for path in paths:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
    return paths


def by_position(axis, rows: list[dict]) -> None:
    """Draw a line for each draft: solid where the target judges it, dashed where a draft of the target's does."""
    for row in rows:
        if row["judge"] == 0 and "," in row["stack"]:
            continue  # the line of the same draft without anything below it
        points = zip(row["acceptance_by_position"], row["judged_by_position"], strict=True)
        shown = [accepted if judged >= LEAST else float("nan") for accepted, judged in points]
        axis.plot(
            range(1, len(shown) + 1),
            shown,
            color=colour(row),
            linestyle="--" if row["judge"] else "-",
            marker="o",
            markersize=3.5,
            markerfacecolor="white" if row["judge"] else None,
        )
    axis.set_ylim(0, 1.02)
    axis.set_xlim(0.7, max(row["draft_len"] for row in rows) + 0.3)
    axis.set_xticks(range(1, max(row["draft_len"] for row in rows) + 1))
    axis.set_xlabel("position in the draft")
    axis.grid(axis="y", color="#e0e0e0", linewidth=0.7)


def predicted(axis, rows: list[dict], temperatures: list[float]) -> None:
    """Draw a point for each draft and temperature against the line on which the prediction is right."""
    most = max(max(row["tokens_per_round"], row["predicted_tokens_per_round"]) for row in rows) + 0.4
    axis.plot([1, most], [1, most], color=GREY, linewidth=0.8, zorder=0)
    for row in rows:
        if row["judge"] == 0 and "," in row["stack"]:
            continue
        axis.plot(
            row["predicted_tokens_per_round"],
            row["tokens_per_round"],
            MARKERS[temperatures.index(row["temperature"]) % len(MARKERS)],
            color=colour(row),
            markerfacecolor="white" if row["judge"] else None,
            markersize=6,
        )
    ticks = range(1, int(most) + 1)
    axis.set(xlim=(0.8, most), ylim=(0.8, most), xticks=ticks, yticks=ticks, aspect="equal")
    axis.set(xlabel="predicted from acceptance by position", ylabel="measured")
    axis.set_title("tokens a round", loc="left")
    marks = [
        Line2D([], [], color=GREY, marker=MARKERS[i % len(MARKERS)], linestyle="", label=f"T = {t:g}")
        for i, t in enumerate(temperatures)
    ]
    axis.legend(handles=marks, loc="lower right", frameon=False)


def keys(rows: list[dict]) -> list[Line2D]:
    """Return the legend's entries: the drafts that were measured, and what solid and dashed mean."""
    drawn = {draft_of(row) for row in rows}
    lines = [Line2D([], [], color=c, marker="o", markersize=3.5, label=name) for name, c in COLOURS.items() if name in drawn]
    if any(row["judge"] for row in rows):
        lines += [
            Line2D([], [], color=GREY, label="judged by the target"),
            Line2D([], [], color=GREY, linestyle="--", label="judged by the mxfp4 draft, one level down"),
        ]
    return lines


def colour(row: dict) -> str:
    """Return the colour of what drafts."""
    return COLOURS[draft_of(row)]


def draft_of(row: dict) -> str:
    """Return the draft that a row is about: the stack's first, or the one below it."""
    return row["stack"].split(", ")[row["judge"]]
