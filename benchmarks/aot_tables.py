"""The table of programs compiled for chips that were not there."""


def programs(result: dict) -> str:
    """Return the table of whole programs, and what the TPU kernel costs in instruction bundles."""
    lines = [
        "| target, on | devices | arguments, a device | temporary | updated in place | share of memory |",
        "|---" * 6 + "|",
    ]
    for name, facts in result["programs"].items():
        sizes = [facts[key] / 1e9 for key in ("argument bytes a device", "temporary bytes a device", "updated in place")]
        lines.append(
            f"| {name} | {facts['devices']} | {sizes[0]:.2f} GB | {sizes[1]:.3f} GB | {sizes[2]:.3f} GB | "
            f"{facts['share of memory']:.0%} |"
        )
    drafts = sorted({f"{facts['draft']}" for facts in result["programs"].values()})
    about = f"Target > its MXFP4 twin > the MXFP4 twin of {' or '.join(drafts)}, at full depth, one row of 1,280 slots."
    return "\n".join([*lines, "", f"{about} {bundles(result['bundles'])}", "", *formats(result["formats"])])


def bundles(result: dict) -> str:
    """Return what a block of weights costs the TPU kernel beside the cycles in which memory delivers it."""
    each = []
    for chip, sizes in result.items():
        size, found = max(sizes.items(), key=lambda item: item[1]["memory cycles"])
        tile, block = found["block"]
        each.append(
            f"on {chip} {found['8']['mxfp4']} for up to 8 rows and {found['16']['mxfp4']} for 16 against {found['memory cycles']} "
            f"(a block of {tile} x {block}, weight {size}; a BF16 kernel of the same block: {found['8']['bf16']})"
        )
    return f"Instruction bundles of the TPU kernel against the cycles in which memory delivers the weights: {'; '.join(each)}."


def formats(result: dict) -> list[str]:
    """Return the lines of a table of the TPU kernel for all formats: bundles over the cycles of memory, for 8 and 16 rows."""
    chips = list(result)
    heads = (f"{chip}: {rows} rows" for chip in chips for rows in (8, 16))
    lines = [f"| bundles of the TPU kernel for all formats, and what it then takes of bfloat16's time | {' | '.join(heads)} |"]
    lines.append("|---" * (1 + 2 * len(chips)) + "|")
    for name in sorted(result[chips[0]], key=lambda name: (result[chips[0]][name]["memory cycles"], name)):
        cells = []
        for chip in chips:
            found = result[chip][name]
            memory, plain = found["memory cycles"], found["memory cycles in bf16"]
            cells += [f"{found[rows] / memory:.2f}, {max(found[rows], memory) / plain:.2f}" for rows in ("8", "16")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = (
        "First bundles over the cycles in which memory delivers the packed block, then the longer of the two over what memory takes"
    )
    return [*lines, "", f"{note} for that block in bfloat16; at 4096 x 4096, by counting alone."]
