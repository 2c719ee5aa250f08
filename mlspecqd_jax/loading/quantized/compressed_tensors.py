"""compressed-tensors, the format of llm-compressor: https://github.com/vllm-project/compressed-tensors.

- pack-quantized: `weight_packed` int32 [N, K * b / 32] with the fields along K, codes plus half of their range; `weight_scale`
  [N, G]; `weight_zero_point` int32 [N * b / 32, G] with the fields along N, in the same way; `weight_g_idx` as GPTQ's.
- int-quantized: `weight` int8 [N, K]; float-quantized: `weight` E4M3 [N, K], its scale for the tensor, a row or 128 x 128 elements.
- nvfp4-pack-quantized, mxfp4-pack-quantized: `weight_packed` uint8 [N, K / 2]; NVFP4's `weight_global_scale` is a divisor.

Scales of activations do not bear on weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.quantized import floats
from mlspecqd_jax.loading.quantized.codes import bytes_of, filled, joined, split
from mlspecqd_jax.loading.quantized.grouped import BITS, Scheme, chosen, counts, order_of, packed, scheme_of
from mlspecqd_jax.loading.quantized.module import Module, Packed, Reader
from mlspecqd_jax.loading.quantized.words import one_of, table

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")


def compressed_tensors(config: dict) -> Reader:
    """Return what reads a module of a checkpoint with this quantization_config.

    Raises:
      InputError: a variant that is not read.
    """
    one_of(config, "quantization_status", ("compressed",), "compressed")
    one_of(table(config, "sparsity_config"), "format", ("dense",), "dense")
    if config.get("transform_config"):
        raise InputError("transform_config changes activations, which is not read; use a checkpoint without transforms")
    groups = [group for group in table(config, "config_groups").values() if isinstance(group, dict)]
    mixed = config.get("format") == "mixed-precision"
    formats = {one_of(group if mixed else config, "format", FORMATS) for group in groups}
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    if not weights:
        raise InputError("config_groups names no weights; download config.json again")
    integers = [_scheme(w) for w in weights if w.get("type") == "int"]
    tiled = {_is_tiled(w) for w in weights if w.get("type") == "float" and w.get("num_bits") == 8}
    return lambda module: _read(module, formats, integers, tiled)


def _scheme(weights: Mapping[str, Any]) -> Scheme:
    strategy = one_of(weights, "strategy", ("tensor", "channel", "group"))
    given = dict(weights) | ({} if strategy == "group" else {"group_size": -1})
    return scheme_of(given, "num_bits", "group_size", "symmetric")


def _is_tiled(weights: Mapping[str, Any]) -> bool:
    if one_of(weights, "strategy", ("tensor", "channel", "block")) != "block":
        return False
    if weights.get("block_structure") != [floats.TILE, floats.TILE]:
        raise InputError(f"block_structure is {brief(weights.get('block_structure'))}, but blocks of [128, 128] alone are read")
    return True


def _read(module: Module, formats: set[str], integers: Sequence[Scheme], tiled: set[bool]) -> Packed:
    format = _format(module)
    if format not in formats:
        names = ", ".join(stored.name for stored in module.tensors.values())
        raise InputError(f"tensors {names} are {format}, but the config says {', '.join(sorted(formats))}")
    if format == "mxfp4-pack-quantized":
        module.holds(("weight_packed", "weight_scale"))
        return floats.mxfp4(module, "weight_packed", "weight_scale")
    if format == "nvfp4-pack-quantized":
        module.holds(("weight_packed", "weight_scale", "weight_global_scale"))
        factor = np.float32(1) / module.factor("weight_global_scale")
        return floats.nvfp4(module, "weight_packed", "weight_scale", factor)
    if format == "float-quantized":
        module.holds(("weight", "weight_scale"))
        shape = module.tensors["weight_scale"].array.shape
        tile = tuple(-(-size // floats.TILE) for size in module.shape)
        return floats.fp8(module, "weight", "weight_scale", tiled == {True} or (True in tiled and shape == tile))
    return _int8(module, integers) if format == "int-quantized" else _packed(module, integers)


def _format(module: Module) -> str:
    """Return what the tensors are."""
    tensors = module.tensors
    if "weight_packed" in tensors and tensors["weight_packed"].dtype == "I32":
        return "pack-quantized"
    if "weight_packed" in tensors:
        e8m0 = tensors.get("weight_scale") is not None and tensors["weight_scale"].dtype in ("U8", "F8_E8M0")
        return "mxfp4-pack-quantized" if e8m0 else "nvfp4-pack-quantized"
    return "int-quantized" if "weight" in tensors and tensors["weight"].dtype == "I8" else "float-quantized"


def _packed(module: Module, schemes: Sequence[Scheme]) -> Packed:
    module.holds(("weight_packed", "weight_scale", "weight_shape"), optional=("weight_zero_point", "weight_g_idx"))
    n, k = module.shape
    if module.get("weight_shape", ("I64", "I32"), (2,)).tolist() != [n, k]:
        raise InputError(f"tensor {module.tensors['weight_shape'].name} is not {[n, k]}, as config.json asks for")
    words = module.get("weight_packed", ("I32",), *((n, -(-k * bits // 32)) for bits in BITS))
    bits = next(bits for bits in BITS if words.shape[1] == -(-k * bits // 32))
    scales, zeros, scheme = _scales(module, schemes, bits)
    if zeros is not None:
        zeros = module.get("weight_zero_point", ("I32",), (-(-n * bits // 32), scales.shape[1]))
        zeros = split(bytes_of(zeros.T), bits)[:, :n].T
    order = order_of(module, "weight_g_idx", scales.shape[1], scheme.group or k)
    codes = bytes_of(words)
    stored = filled(codes, bits, k) if order is None else joined(split(codes, bits)[:, order], bits)
    return packed(stored, scales, zeros, bits, scheme.group, k, order)


def _int8(module: Module, schemes: Sequence[Scheme]) -> Packed:
    module.holds(("weight", "weight_scale"), optional=("weight_zero_point",))
    n, k = module.shape
    scales, zeros, scheme = _scales(module, schemes, 8)
    if zeros is not None:
        zeros = module.get("weight_zero_point", ("I8",), zeros.array.shape, scales.shape).view(np.uint8) ^ 128
        zeros = np.broadcast_to(zeros.reshape(-1, scales.shape[1]), scales.shape)
    codes = module.get("weight", ("I8",), (n, k)).view(np.uint8) ^ 128  # two's complement to an offset
    return packed(filled(codes, 8, k), scales, zeros, 8, scheme.group, k)


def _scales(module: Module, schemes: Sequence[Scheme], bits: int):
    """Return (scales f32 [N, G], the stored zeros or None, the scheme that they are of)."""
    n, k = module.shape
    zeros = module.tensors.get("weight_zero_point")
    meant = [s for s in schemes if s.symmetric is None or s.symmetric == (zeros is None)]
    if not meant:
        name = module.tensors["weight_scale"].name if zeros is None else zeros.name
        raise InputError(f"tensor {name}: a zero point is {'missing' if zeros is None else 'there'}, unlike in the config")
    scales = module.scales("weight_scale", (1,), *((n, groups) for groups in counts(meant, bits, k)))
    scales = np.broadcast_to(scales.reshape(1, 1), (n, 1)).copy() if scales.shape == (1,) else scales
    return scales, zeros, chosen(meant, bits, scales.shape[1], module, "weight_scale")
