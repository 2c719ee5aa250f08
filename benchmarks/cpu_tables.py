"""The tables of what runs on CPU: weight products, decoding, and peers."""

from mlspecqd_jax.speculation.theory import Profile, pass_time, rounds_for, speedup

DRAFT_LENGTHS = range(1, 16)
ACCEPTANCE = 0.9


def products(result: dict) -> str:
    """Return the table of weight products by rows: rates over the weight's bytes, BF16 against the read, MXFP4 against BF16."""
    lines = [
        "| weight [N, K] | M | XLA, BF16 | C++, BF16 | of the read rate | C++, MXFP4 | time of BF16 / MXFP4 |",
        "|---" * 7 + "|",
    ]
    for size, by_rows in result["products"].items():
        for rows, found in by_rows.items():
            xla, bf16, mxfp4 = (f"{found['gb_per_second'][kind]['median']:.1f}" for kind in ("xla", "bf16", "mxfp4"))
            name = size.replace("x", " x ") if rows == "1" else ""
            share, ratio = (found[key]["median"] for key in ("bf16_share_of_read", "bf16_seconds_over_mxfp4"))
            lines.append(f"| {name} | {rows} | {xla} | {bf16} | {share:.0%} | {mxfp4} | {ratio:.2f} |")
    read = result["read_gb_per_second"]
    note = (
        f"GB/s of weight bytes; medians of {result['trials']}, and of the ratios within each. The same cores read memory at "
        f"{read['median']:.1f} GB/s (other tenants' work included: {read['min']:.1f} to {read['max']:.1f})."
    )
    return "\n".join([*lines, "", note])


def passes(median: dict, digits: int = 0) -> list[str]:
    """Return the table of passes of target and twin by positions."""
    windows = [name.split(", ")[1] for name in median if name.startswith("target") and "products" not in name]
    lines = ["| positions a pass | " + " | ".join(windows) + " |", "|---" * (len(windows) + 1) + "|"]
    for model in ("target", "twin"):
        lines.append(f"| {model} | " + " | ".join(f"{1e3 * median[f'{model}, {w}']:.{digits}f} ms" for w in windows) + " |")
    ratios = " | ".join(f"{median[f'twin, {w}'] / median[f'target, {w}']:.2f}" for w in windows)
    return [*lines, f"| twin / target | {ratios} |"]


def trained(result: dict) -> str:
    """Return the tables of a trained model's passes and of its stacks, with the acceptance that its weights have."""
    how = f"{result['prompts']} prompts one by one, {result['new']} new tokens each, greedy"
    median = {name: s["median"] for name, s in result["seconds"].items()}
    return "\n".join(
        [
            *passes(median, 1),
            "",
            *family(result["stacks"], result["model"]),
            "",
            f"{how}; medians of {result['trials']}, all in turn.",
        ]
    )


def decoding(result: dict) -> str:
    """Return the tables of passes and of stacks, and what memory it all takes."""
    size = result["read_bytes"]
    median = {name: s["median"] for name, s in result["seconds"].items()}
    stacks = ["| stack | tokens/s | over plain | tokens a round (formula) | over plain at the formula's |", "|---" * 5 + "|"]
    for name, s in result["generation_seconds"].items():
        times, fair, expected = over_plain(result, name)
        each = f"{result['tokens_per_round'][name]:.2f} ({expected:.2f}) | {fair:.2f} x"
        stacks.append(f"| {name} | {result['new'] / s['median']:.1f} | {times:.2f} x | {each} |")
    share = median["read"] / median["target, 1"]
    rest = {m: 1e3 * (median[f"{m}, 1"] - median[f"{m}, 1, products"]) for m in ("target", "twin")}
    notes = [
        f"Reading the target's {size / 1e9:.2f} GB takes {1e3 * median['read']:.0f} ms, {share:.0%} of its pass of one position. "
        f"Of that pass all but {rest['target']:.1f} ms are weight products; of the twin's, all but {rest['twin']:.1f} ms. A prompt "
        f"of 512 tokens takes {median['prefill']:.2f} s.",
        memory(result["memory"]),
    ]
    return "\n".join([*passes(median), "", *stacks, "", " ".join(notes), "", *family(result["demo"], "demo, 9.4M parameters")])


def over_plain(result: dict, name: str) -> tuple[float, float, float]:
    """Return how many times as fast as plain decoding a stack is, the same without luck, and tokens a round by the formula."""
    lengths, rates = result["stacks"][name]
    expected = result["new"] / rounds_for(result["new"], [rates[0]] * lengths[0]) if rates else 1
    times = result["generation_seconds"]["plain"]["median"] / result["generation_seconds"][name]["median"]
    return times, times * expected / result["tokens_per_round"][name], expected


def family(demo: dict, name: str) -> list[str]:
    """Return the table of stacks of trained weights, whose acceptance is real."""
    plain = demo["tokens_per_second"]["plain"]["median"]
    lines = [f"| {name} | token acceptance | tokens/s | over plain |", "|---" * 4 + "|"]
    for name, rate in demo["tokens_per_second"].items():
        accepted = demo["token_acceptance"][name]
        shown = "" if accepted is None else f"{accepted:.3f}"
        lines.append(f"| {name} | {shown} | {rate['median']:.0f} | {rate['median'] / plain:.2f} x |")
    return lines


def memory(m: dict) -> str:
    """Return the anonymous memory of a model with its twin."""
    accounted = m["weights"] + m["twin_adds"] + m["caches"]
    rest = (m["peak_anonymous_bytes"] - accounted) / 1e6
    return (
        f"Anonymous memory peaks at {m['peak_anonymous_bytes'] / 1e9:.2f} GB: the weights' {m['weights'] / 1e9:.2f}, the twin's "
        f"{m['twin_adds'] / 1e9:.2f}, the cache's {m['caches'] / 1e9:.2f}, and {rest:.0f} MB."
    )


def peers(result: dict) -> str:
    """Return the table of peers, and one level of speculation in each by the formula."""
    median = {name: s["median"] for name, s in result["seconds"].items()}
    names = list(dict.fromkeys(name.split(": ")[0] for name in median))
    lines = ["| | tokens/s | 8 positions / 1 | prompt of 512 |", "|---" * 4 + "|"]
    for name in names:
        eight = f"{name}: 8 positions"
        verify = f"{median[eight] / median[f'{name}: 1 position']:.2f}" if eight in median else "not measured"
        lines.append(f"| {name} | {1 / median[f'{name}: token']:.2f} | {verify} | {median[f'{name}: prefill']:.2f} s |")
    notes = [f"Medians of {result['trials']}, all in turn."]
    if "llama.cpp Q4_0" in names:
        ours = best(median, "ours", "ours: twin, 1 position")
        theirs = best(median, "llama.cpp BF16", "llama.cpp Q4_0: 1 position")
        notes.append(
            f"One level at token acceptance {ACCEPTANCE}, by the formula from these passes, best draft_len: {1 / ours:.1f} "
            f"tokens/s with the MXFP4 twin here, {1 / theirs:.1f} with the Q4_0 draft in llama.cpp ({theirs / ours:.2f} x)."
        )
    return "\n".join([*lines, "", " ".join(notes)])


def best(median: dict, target: str, draft: str) -> float:
    """Return the least seconds a token, over draft_len, of a target with a draft."""
    one = median[f"{target}: 1 position"]
    passes = pass_time({1: one, 8: max(median[f"{target}: 8 positions"], one)})
    drafts = Profile(lambda rows: median[draft])
    return one / max(speedup([Profile(passes, [ACCEPTANCE] * g), drafts]) for g in DRAFT_LENGTHS)
