"""What `mlspecqd sensitivity` shows: a table of kinds of weight by formats, and a picture of layers by kinds."""

import importlib.util
import pathlib
import re
from collections.abc import Mapping

from mlspecqd_jax.errors import InputError

SUFFIXES = (".png", ".svg", ".pdf")

Costs = Mapping[str, Mapping[str, float]]


def kind_of(name: str) -> str:
    """Return a weight's name without its layer: `q_proj`, `lm_head`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def layer_of(name: str) -> int | None:
    """Return the number of a weight's layer; a head has none."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return None if found is None else int(found[1])


def table(costs: Costs) -> str:
    """Return a line for each kind of weight: what casting all of it to each format costs, in thousandths of a nat a token."""
    formats = list(next(iter(costs.values())))
    kinds: dict[str, list[Mapping[str, float]]] = {}
    for name, each in costs.items():
        kinds.setdefault(kind_of(name), []).append(each)
    rows = [("", *formats)]
    rows += [(kind, *(f"{1e3 * sum(w[f] for w in each):.2f}" for f in formats)) for kind, each in kinds.items()]
    rows.append(("all", *(f"{1e3 * sum(w[f] for w in costs.values()):.2f}" for f in formats)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    note = "Thousandths of a nat a token by which the model's probabilities move when these weights are cast."
    return "\n".join([*lines, "", note]) + "\n"


def check_plot(file: str) -> None:
    """Raise an InputError unless a picture can be drawn and written there."""
    path = pathlib.Path(file)
    if path.suffix not in SUFFIXES:
        raise InputError(f"--plot {file} ends in none of {', '.join(SUFFIXES)}; give such a name")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {file} is in no folder that is there; create it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib; install it with pip install 'mlspecqd-jax[plot]'")


def plot(costs: Costs, file: str) -> None:
    """Draw, for each format, layers (across) by kinds of weight (down): the darker, the more casting costs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    formats = list(next(iter(costs.values())))
    inner = {name: each for name, each in costs.items() if layer_of(name) is not None}
    kinds = list(dict.fromkeys(map(kind_of, inner)))
    layers = 1 + max(layer_of(name) or 0 for name in inner)
    values = [each[f] for each in costs.values() for f in formats if each[f] > 0]
    scale = LogNorm(max(min(values), 1e-4 * max(values)), max(values))
    figure, axes = pyplot.subplots(len(formats), 1, figsize=(9, 1.2 + 1.6 * len(formats)), squeeze=False, layout="constrained")
    for axis, format in zip(axes[:, 0], formats, strict=True):
        grid = [[0.0] * layers for _ in kinds]
        for name, each in inner.items():
            grid[kinds.index(kind_of(name))][layer_of(name) or 0] = each[format]
        image = axis.imshow(grid, aspect="auto", cmap="magma_r", norm=scale)
        heads = ", ".join(f"{kind_of(n)} {each[format]:.1e}" for n, each in costs.items() if n not in inner)
        axis.set_title(f"{format}: {sum(each[format] for each in costs.values()):.2g} nats a token in all; {heads}", fontsize=9)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1, 0].set_xlabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="nats a token", fraction=0.03)
    figure.savefig(file)
    pyplot.close(figure)
