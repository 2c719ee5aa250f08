"""The tables of what comes before the first text: starts, and how long programs are made."""

KINDS = {
    "first": "first ever (compiles C++ and programs)",
    "cold": "first of its kind (compiles programs)",
    "warm": "later (both kept)",
}
STAGES = ("trace", "lower", "compile")


def startup(result: dict, spread) -> str:
    """Return the table of start-up times."""
    head = ["seconds to the first text", "processors' seconds to the first text", "seconds to the end"]
    drafts = "".join(f" --draft {draft}" for draft in result["drafts"])
    lines = [f"| {result['model']}{drafts} | {' | '.join(head)} |", "|---|---|---|---|"]
    for kind, name in KINDS.items():
        measures = ("first_text_seconds", "first_text_processor_seconds", "total_seconds")
        lines.append(f"| {name} | {' | '.join(spread(result[measure][kind]) for measure in measures)} |")
    return "\n".join(lines)


def compiling(result: dict) -> str:
    """Return the tables of tracing, lowering and compiling, a device each: by layers and levels, in processors' seconds."""
    tables = []
    for device in dict.fromkeys(run["device"] for run in result["runs"]):
        runs = {(run["layers"], run["levels"]): run["stages"] for run in result["runs"] if run["device"] == device}
        levels = sorted({level for _, level in runs})
        heads = [f"{level} level{'s' * (level > 1)}" for level in levels]
        lines = [f"| {device}: trace + lower + compile | {' | '.join(heads)} |", "|---" * (1 + len(levels)) + "|"]
        for layers in sorted({layers for layers, _ in runs}):
            cells = [_stages(runs.get((layers, level))) for level in levels]
            lines.append(f"| {layers} layers | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _stages(stages: dict | None) -> str:
    if stages is None:
        return "not measured"
    return " + ".join(f"{stages[stage]['processor']:.1f}" for stage in STAGES) + " s"
