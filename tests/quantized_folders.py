"""Tiny models quantized to every layout: what a folder holds, its config, and the weights that it stands for."""

import json
import pathlib

import folders
import numpy as np
import quantized_layouts as layouts
import tiny

# Inputs of 64, and of 192, which are one group and a half of 128; no outputs in whole tiles of 128.
CONFIG = tiny.FAMILIES["llama3"] | {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def weights(seed: str = "", config: dict = CONFIG) -> dict[str, np.ndarray]:
    """Return weights that float16 holds."""
    return {name: w.astype(np.float16).astype(np.float32) for name, w in tiny.weights(config, seed).items()}


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _gptq(w, **more):
    k = w.shape[1]
    of = np.random.default_rng(k).permutation(np.arange(k) // 128) if more.get("act_order") else None
    a = layouts.rounded(w, more.get("bits", 4), 128, more.get("symmetric", True), of)
    return layouts.gptq(a, more.get("version", 1)), a.weight


def _group(w, write, **more):
    a = layouts.rounded(w, **more)
    return write(a), a.weight


def _fp8(w, kind, scale):
    a = layouts.e4m3(w, kind)
    return {"weight": a.codes, scale: a.scales}, a.weight


def _nvfp4(w, name, scale, inverse):
    factor = np.float32(np.abs(w).max() / 448 / 6)
    a = layouts.nv(w, float(factor))
    stored = np.array([1 / factor] if inverse else factor, np.float32)
    return {name: layouts.nibbles(a.codes), "weight_scale": a.scales, scale: stored}, a.weight


def _mxfp4(w, name):
    a = layouts.mx(w)
    return {name: layouts.nibbles(a.codes), "weight_scale": a.scales}, a.weight


def compressed(format: str, **weights) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "strategy": "group"} | weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


def quark(dtype: str, **weight) -> dict:
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": dtype} | weight},
        "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": None, "fmt": "e4m3"}
INT4 = {"num_bits": 4, "group_size": 32}
UINT4 = {"num_bits": 4, "group_size": 64, "symmetric": False}
# By name: quantization_config, and from a weight to (tensors of its layer, what they stand for).
LAYOUTS = {
    "gptq": (GPTQ, _gptq),
    "gptq act-order": (GPTQ | {"desc_act": True}, lambda w: _gptq(w, act_order=True)),
    "gptq v2 with zeros": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, lambda w: _gptq(w, symmetric=False, version=2)),
    "gptq 8 bits": (GPTQ | {"bits": 8}, lambda w: _gptq(w, bits=8)),
    "awq": (AWQ, lambda w: _group(w, layouts.awq, bits=4, group=32, symmetric=False)),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "packing_format": "auto_round:auto_gptq"},
        _gptq,
    ),
    "int4": (
        compressed("pack-quantized", **INT4),
        lambda w: _group(w, layouts.pack_quantized, bits=4, group=32, symmetric=True),
    ),
    "uint4": (
        compressed("pack-quantized", **UINT4),
        lambda w: _group(w, lambda a: layouts.pack_quantized(a, zeros=True), bits=4, group=64, symmetric=False),
    ),
    "int8": (
        compressed("int-quantized", num_bits=8, strategy="channel"),
        lambda w: _group(w, layouts.int_quantized, bits=8, group=w.shape[1], symmetric=True, dtype=np.float32),
    ),
    "fp8 tiles": (FP8 | {"weight_block_size": [128, 128]}, lambda w: _fp8(w, "tile", "weight_scale_inv")),
    "fp8 rows": (
        compressed("float-quantized", type="float", num_bits=8, strategy="channel"),
        lambda w: _fp8(w, "row", "weight_scale"),
    ),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16),
        lambda w: _nvfp4(w, "weight_packed", "weight_global_scale", inverse=True),
    ),
    "modelopt nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda w: _nvfp4(w, "weight", "weight_scale_2", inverse=False),
    ),
    "mxfp4": (
        compressed("mxfp4-pack-quantized", type="float", num_bits=4, strategy="group", group_size=32),
        lambda w: _mxfp4(w, "weight_packed"),
    ),
    "quark fp4": (quark("fp4", qscheme="per_group", group_size=32, scale_format="e8m0"), lambda w: _mxfp4(w, "weight")),
    "quark int4": (
        quark("int4", qscheme="per_group", group_size=32),
        lambda w: _group(w, lambda a: layouts.quark_int4(a, True), bits=4, group=32, symmetric=True),
    ),
}


def quantized(layout: str, plain: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return (the tensors of a file, the weights that it stands for)."""
    tensors, stands_for = {}, {}
    for name, w in plain.items():
        if not is_linear(name):
            tensors[name], stands_for[name] = w.astype(np.float16), w
            continue
        of_layer, stands_for[name] = LAYOUTS[layout][1](w.astype(np.float64))
        tensors |= {f"{name.removesuffix('weight')}{kind}": np.asarray(array) for kind, array in of_layer.items()}
    return tensors, stands_for


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray], quantization: dict | None, config: dict = CONFIG) -> pathlib.Path:
    """Write a folder as these methods' tools do."""
    folders.write_tokenizer(folder)
    layouts.write(folder / "model.safetensors", tensors)
    config = config if quantization is None else config | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_plain(folder: pathlib.Path, plain: dict[str, np.ndarray], config: dict = CONFIG) -> pathlib.Path:
    """Write the original."""
    return write(folder, {name: w.astype(np.float16) for name, w in plain.items()}, None, config)


def split(folder: pathlib.Path, *shards: dict[str, np.ndarray]) -> None:
    """Write a folder's tensors again, in shards and with an index."""
    (folder / "model.safetensors").unlink()
    index = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        layouts.write(folder / file, shard)
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
