"""The tables of one accelerator: products, generation with random weights, and exactness of a real model."""

# By part of the result: how its exact stacks were compiled, now and in earlier versions.
ALGORITHMS = {
    "exactness, algorithms timed": "timed",
    "exactness, products joined": "cuBLAS, products of one x joined",
    "exactness": "cuBLAS",
}
PROGRAMS = {"programs, products joined": "joined", "programs": "apart"}


def measured(result: dict) -> str:
    """Return the tables of what was measured."""
    more = [make(result[part]) for part, make in {"formats": products, "experts": experts}.items() if part in result]
    return "\n\n".join([products(result["kernels"]), *more, generation(result), exactness(result)])


def products(part: dict) -> str:
    """Return the table of weight products: time, and share of the rate at which the device reads memory."""
    found = {(run["n"], run["k"], run["rows"], run["product"].split()[0]): run for run in part["products"]}
    rows = sorted({rows for _, _, rows, _ in found})
    lines = [f"| weight [N, K] | product | {' | '.join(f'M = {m}' for m in rows)} |", "|---" * (len(rows) + 2) + "|"]
    for n, k, product in dict.fromkeys((n, k, product) for n, k, _, product in found):
        each = [found[n, k, m, product] for m in rows]
        cells = " | ".join(f"{1e6 * run['seconds']:.0f} µs, {run['share_of_roof']:.0%}" for run in each)
        lines.append(f"| {n} x {k} | {product} | {cells} |")
    note = f"Time of a product, and its share of the rate at which the device reads memory, {part['read_gb_per_second']:,.0f} GB/s."
    return "\n".join([*lines, "", note])


def experts(part: dict) -> str:
    """Return the table of products with experts' weights: time, and share of the memory's rate by the bytes of those hit."""
    lines = ["| mixture, [N, K] | product | positions | different experts | time | share of memory's rate |", "|---" * 6 + "|"]
    for run in part["products"]:
        lines.append(
            f"| {run['mixture']}, {run['n']} x {run['k']} | {run['product']} | {run['rows']} | {run['distinct_experts']:.1f} | "
            f"{1e6 * run['seconds']:.0f} µs | {run['share_of_roof']:.0%} |"
        )
    return "\n".join(lines)


def program_runs(result: dict) -> list[tuple[str, dict]]:
    """Return the runs of whole programs, each with whether exact stacks had products of one x joined."""
    return [(joined, run) for name, joined in PROGRAMS.items() for run in result.get(name, {"runs": []})["runs"]]


def fastest_plain(result: dict) -> dict:
    """Return the run of plain decoding that made the most tokens a second, exact or not, whatever XLA's settings."""
    return max((run for _, run in program_runs(result) if run["stack"] == "plain"), key=lambda run: run["tokens_per_second"])


def generation(result: dict) -> str:
    """Return the table of whole programs on random weights, whose drafts coins accept."""
    plain = fastest_plain(result)
    head = (
        "| stack | exact | products of one x | coins accept | tokens/s | over the fastest plain | a round | first call, compiling |"
    )
    lines = [head, "|---" * 8 + "|"]
    for joined, run in program_runs(result):
        coins = ", ".join(map(str, run["acceptance"] or []))
        exact, products = ("yes", joined) if run["exact"] else ("no", "joined")
        ratio = run["tokens_per_second"] / plain["tokens_per_second"]
        lines.append(
            f"| {run['stack']} | {exact} | {products} | {coins} | {run['tokens_per_second']:.0f} | "
            f"{ratio:.2f} x | {1e3 * run['seconds_a_round']:.1f} ms | {run['seconds_with_compiling']:.0f} s |"
        )
    moved, rate = result["programs"]["weight_bytes_of_a_pass"], result["kernels"]["read_gb_per_second"]
    share = moved["target"] / plain["seconds_a_round"] / 1e9 / rate
    note = (
        f"Llama-3.1-8B's shape, one row, draft_len {result['programs']['draft_len']}, the twin drafted for by look-up in `nested`. "
        f"The fastest plain decoding reads its {moved['target'] / 1e9:.1f} GB at {share:.0%} of the memory's rate."
    )
    return "\n".join([*lines, "", note])


def exactness(result: dict) -> str:
    """Return the table of rows that differ from plain decoding of the same batch, and of each row alone."""
    head = (
        "| stack | algorithms | batch | T | rows | unlike plain, same batch | unlike plain, alone | token acceptance | tokens/s |"
    )
    lines = [head, "|---" * 9 + "|"]
    for name, algorithms in ALGORITHMS.items():
        for run in result.get(name, {"runs": []})["runs"]:
            timed = run["stack"].endswith("exact=False")  # such a stack is compiled as XLA likes
            accepted = f"{run['token_acceptance']:.3f}" if run["token_acceptance"] else ""
            cells = (run["stack"], "timed" if timed else algorithms, run["batch"], f"{run['temperature']:g}", run["rows"])
            cells += (run["unlike_plain"], run["unlike_plain_alone"], accepted, f"{run['tokens_per_second']:.0f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    model = next(result[name]["model"] for name in reversed(ALGORITHMS) if name in result)
    note = f"{model}, bfloat16, 100 new tokens a row."
    return "\n".join([*lines, "", note])
