"""Writes the tables of docs/models.md: what is read, and what of it the tests compare and draft, from the tests' own checkpoints.

python docs/family_table.py            # rewrite what stands between the markers
python docs/family_table.py --check    # exit 1 if the page says anything else, and name what
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import family_files  # noqa: E402  (of the tests)

from mlspecqd_jax.loading.config_file import WRAPPERS, config_of  # noqa: E402
from mlspecqd_jax.network.config import MLP, Attention, ClampedSwish, Config, DeltaNet, Experts, LatentAttention, ShortConv  # noqa: E402
from mlspecqd_jax.network.families import FAMILIES  # noqa: E402

PAGE = ROOT / "docs" / "models.md"

# Multimodal types whose language models alone are compared: transformers runs no text through the one, and writes the other under
# names that no published file has.
BY_ITS_TEXT = {"llama4", "kimi_k25"}
ROPES = {"yarn": "YaRN", "longrope": "LongRoPE"}
ACTS = {"silu": "SiLU", "relu2": "squared ReLU", "xielu": "xIELU"}  # all others are ways to compute GELU


class Row(NamedTuple):
    """What is said in words of model types that stand in one row."""

    types: tuple[str, ...]
    models: str
    differs: str = ""


ROWS = (
    Row(("llama",), "Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama, Yi, DeepSeek-R1-Distill"),
    Row(("mistral", "ministral", "cwm"), "Mistral, Ministral, CWM", "sliding windows"),
    Row(("ministral3",), "Ministral 3, Devstral 2", "YaRN, queries that grow with their position"),
    Row(("qwen2", "qwen3"), "Qwen2, Qwen2.5, Qwen3", "biases; norms of each query's and key's head"),
    Row(
        ("gemma", "gemma2", "gemma3_text", "vaultgemma"),
        "Gemma 1 to 3, VaultGemma",
        "norms of 1 + weight, scaled embeddings; norms after each part, caps, windows",
    ),
    Row(
        ("gemma4_text", "gemma4_unified_text"),
        "Gemma 4: E2B, E4B, 12B, 26B-A4B, 31B",
        "heads of two sizes, normed values, values that are keys, layers with earlier ones' keys and values, an embedding by "
        "layer, experts beside an MLP",
    ),
    Row(("phi3",), "Phi-3, Phi-3.5, Phi-4, Phi-4-mini", "fused products in the file, LongRoPE, a part of each head rotated"),
    Row(("phi",), "Phi-1, Phi-1.5, Phi-2", "layer norms, attention and MLP side by side, MLP without a gate"),
    Row(("glm", "glm4"), "GLM-4, GLM-4-0414", "neighbouring pairs of half a head rotated; norms after each part"),
    Row(("smollm3",), "SmolLM3", "layers without positions"),
    Row(
        ("olmo", "olmo2", "olmo3"),
        "OLMo 1 to 3",
        "norms without weights; norms after each part, and of whole queries and keys; windows, a rope for each kind of layer",
    ),
    Row(
        ("granite", "granite_swa", "hyperclovax"),
        "Granite 3, HyperCLOVA X",
        "scaled embeddings, residuals, scores and logits; sinks, a rope for each layer",
    ),
    Row(
        ("cohere", "cohere2"),
        "Command R, Command A",
        "one layer norm, parts side by side, scaled logits; layers without positions",
    ),
    Row(("exaone4",), "EXAONE 4", "norms after each part, layers without positions"),
    Row(("hunyuan_v1_dense",), "Hunyuan dense", "norms of queries and keys after the rotation"),
    Row(("ernie4_5", "helium", "seed_oss"), "ERNIE 4.5 dense, Helium, Seed-OSS", "neighbouring pairs; biases"),
    Row(
        ("gpt2", "gpt_bigcode"),
        "GPT-2, SantaCoder, StarCoder 1",
        "learned positions, layer norms, [K, N] and fused products in the file",
    ),
    Row(("gptj", "gpt_neox"), "GPT-J, GPT-NeoX, Pythia", "a part of each head rotated, parts side by side, a bias of the head"),
    Row(
        ("falcon",),
        "Falcon 7B, 11B, 40B (not those with ALiBi)",
        "one or two norms before parts side by side, products fused by groups of heads",
    ),
    Row(
        ("stablelm", "starcoder2"),
        "StableLM (not those with norms of queries and keys), StarCoder2",
        "layer norms; MLP without a gate",
    ),
    Row(
        ("nemotron", "arcee", "jais2"),
        "Nemotron-4, Minitron, AFM, Jais 2",
        "MLP without a gate that squares what is positive",
    ),
    Row(
        ("qwen2_moe", "qwen3_moe"),
        "Qwen1.5-MoE, Qwen2-57B-A14B, Qwen3-30B-A3B, Qwen3-235B-A22B",
        "experts; a shared one with a gate",
    ),
    Row(
        ("mixtral", "minimax_m2"),
        "Mixtral, MiniMax-M2",
        "experts; chosen by sigmoids and a bias, norms of whole queries and keys",
    ),
    Row(
        ("gpt_oss",),
        "GPT-OSS, also with its experts in MXFP4",
        "experts with biases and a bounded activation, all in one tensor; sinks, windows, YaRN",
    ),
    Row(
        ("glm4_moe",),
        "GLM-4.5, GLM-4.6",
        "experts by groups beside a shared one, behind dense layers; a part of each head rotated",
    ),
    Row(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4", "youtu"),
        "DeepSeek-V2, V2-Lite, V3, R1, Kimi K2.5, GLM-4.7-Flash, Mistral Small 4, Youtu-LLM",
        "latents for keys and values, which are all that is kept; experts by groups beside shared ones, behind dense layers",
    ),
    Row(
        ("granitemoe", "granitemoeshared"),
        "Granite 3 MoE",
        "Granite's scales; experts in one tensor, and a shared one",
    ),
    Row(("olmoe",), "OLMoE", "experts; norms of whole queries and keys, bounded"),
    Row(
        ("ernie4_5_moe", "hunyuan_v1_moe"),
        "ERNIE 4.5 21B-A3B, Hunyuan-A13B",
        "the dense ones' layers with experts and shared ones",
    ),
    Row(
        ("llama4_text",),
        "Llama 4",
        "chunks of positions; layers without; one expert chosen, whose input is scaled, and a shared one",
    ),
    Row(("apertus",), "Apertus", "an activation with parameters"),
    Row(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        "Qwen3-Next, Qwen3.5, Qwen3.6",
        "gated delta nets in three of four layers, gates of what attention returns; experts beside a shared one",
    ),
    Row(
        ("lfm2", "lfm2_moe", "lfm3"),
        "LFM2, LFM2-8B-A1B, LFM3",
        "short convolutions in place of most attention; experts chosen by sigmoids; windows, norms after each part",
    ),
)


def described(raw: dict) -> Config:
    """Return what a config.json of the tests describes."""
    return config_of(Path(tempfile.gettempdir()) / "config.json", raw)


def features(raw: dict) -> list[str]:
    """Return what of a checkpoint's network is not as in the first Llama's, in words."""
    c = described(raw)
    layers, feeds = c.layers, [layer.feed for layer in c.layers]
    mixers = [layer.mixer for layer in layers if isinstance(layer.mixer, Attention | LatentAttention)]
    ropes = [mixer.rope for mixer in mixers]
    sources = [source for _, source in c.sources]
    text = raw.get("text_config") or raw
    stretched = text.get("rope_scaling") or text.get("rope_parameters") or {}
    experts = [feed for feed in feeds if isinstance(feed, Experts)]
    kinds = [each.get("rope_type", each.get("type")) for each in (stretched, *stretched.values()) if isinstance(each, dict)]
    kind, act = next((kind for kind in kinds if kind), None), feeds[0].act
    # Of what is multiplied and turned, and of no latent.
    sizes = [m.key_dim + m.turned_dim if isinstance(m, LatentAttention) else m.head_dim for m in mixers]

    def having(what: str) -> bool:
        return any(getattr(mixer, what, None) for mixer in mixers)

    found = {
        "layer norm": c.norm.centered,
        "1 + weight": c.norm.offset,
        "norms without weights": not c.norm.weight,
        "norms after parts": any(layer.norms[1] or layer.norms[3] for layer in layers),
        "no norms before parts": any(layer.norms[0] is None for layer in layers),
        "side by side": any(layer.parallel for layer in layers),
        "latents": any(isinstance(mixer, LatentAttention) for mixer in mixers),
        "latents of queries": any(getattr(mixer, "query_latent", None) for mixer in mixers),
        "experts": experts,
        "shared experts": any(feed.shared for feed in experts),
        "dense layers": 0 < len(experts) < len(feeds),
        "bounded swish": any(isinstance(feed.act, ClampedSwish) for feed in feeds),
        "short convolutions": any(isinstance(layer.mixer, ShortConv) for layer in layers),
        "delta nets": any(isinstance(layer.mixer, DeltaNet) for layer in layers),
        "gated attention": having("gate"),
        "chunks": having("chunk"),
        "no gate": any(isinstance(feed, MLP) for feed in feeds),
        ACTS.get(act, "GELU"): act != "silu" and not isinstance(act, ClampedSwish),
        "biases": any(mixer.bias or mixer.output_bias for mixer in mixers) or any(feed.bias for feed in feeds),
        "head's bias": c.head_bias,
        "windows": having("window"),
        "learned positions": c.learned_positions,
        "layers without positions": not c.learned_positions and None in ropes,
        "neighbouring pairs": any(rope and rope.interleaved for rope in ropes),
        "part of a head rotated": any(rope and 2 * len(rope.frequencies) < size for rope, size in zip(ropes, sizes, strict=True)),
        "pairs that do not turn": any(rope and 0.0 in rope.frequencies for rope in ropes),
        "ropes by layer": len({rope for rope in ropes if rope}) > 1,
        f"{ROPES.get(kind, kind)} rope": kind not in (None, "default", "mrope"),
        "query and key norms": having("qk_norm"),
        "value norms": having("value_norm"),
        "values that are keys": having("values_of_keys"),
        "earlier layers' keys and values": any(mixer.kept_by is not None for mixer in mixers),
        "sizes of heads by layer": len(set(sizes)) > 1,
        "an embedding by layer": any(layer.own for layer in layers),
        "layers' scalars": any(layer.scalar for layer in layers),
        "growing queries": having("growth"),
        "clipped": having("clip"),
        "capped scores": having("cap"),
        "capped logits": c.logit_cap is not None,
        "sinks": having("sinks"),
        "scaled": c.embed_scale != 1 or c.logit_scale != 1 or any(layer.scale != 1 for layer in layers),
        "scores' scale": any(abs(mixer.scale * size**0.5 - 1) > 1e-6 for mixer, size in zip(mixers, sizes, strict=True)),
        "fused": any(source.groups > 1 or source.start or source.stop for source in sources),
        "transposed": any(source.transpose for source in sources),
        "tied": c.tied,
    }
    return [name for name, is_so in found.items() if is_so]


def compared(types: tuple[str, ...]) -> str:
    """Return how many checkpoints of some model types the tests compare with transformers, and what is in them."""
    configs = [raw for raw in family_files.COMPARED.values() if {raw["model_type"], family_files.text_type(raw)} & set(types)]
    missing = set(types) - {kind for raw in configs for kind in (raw["model_type"], family_files.text_type(raw))}
    if missing:
        raise SystemExit(f"no test compares {', '.join(sorted(missing))} with transformers; add a config to tests/family_files.py")
    found = dict.fromkeys(feature for raw in configs for feature in features(raw))
    return f"{len(configs)}: {', '.join(found) or 'as Llama'}"


def drafted(types: tuple[str, ...]) -> str:
    """Return by what the tests draft for a checkpoint of each of some model types."""
    return ", ".join(family_files.STACKS) if set(types) <= family_files.GENERATED.keys() else "not"


def families() -> str:
    """Return the table of the families."""
    head = ("`model_type`", "models", "what differs from Llama", "checkpoints compared: what is in them", "drafted for by")
    rows = [(names(row.types), row.models, row.differs, compared(row.types), drafted(row.types)) for row in ROWS]
    named = {kind for row in ROWS for kind in row.types} | {kind for kinds in WRAPPERS.values() for kind in kinds}
    if named != set(FAMILIES):
        raise SystemExit(f"the table and the families differ in {', '.join(sorted(named ^ set(FAMILIES)))}; correct ROWS")
    return table(head, rows)


def wrappers() -> str:
    """Return the table of multimodal models."""
    head = ("`model_type`", "its language model may be", "checkpoints compared: what is in them")
    told = {kind: "its language model alone" if kind in BY_ITS_TEXT else compared((kind,)) for kind in WRAPPERS}
    return table(head, [(names((kind,)), names(within), told[kind]) for kind, within in WRAPPERS.items()])


def names(types: tuple[str, ...]) -> str:
    return ", ".join(f"`{kind}`" for kind in types)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = rewritten = PAGE.read_text(encoding="utf-8")
    for name, made in (("families", families()), ("wrappers", wrappers())):
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        if not place.search(rewritten):
            raise SystemExit(f"{PAGE.name} has no place for the table {name}")
        rewritten = place.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", rewritten)
    if check and rewritten != text:
        sys.exit("docs/models.md is not what the families and the tests say; run python docs/family_table.py")
    PAGE.write_text(rewritten, encoding="utf-8")


if __name__ == "__main__":
    main()
