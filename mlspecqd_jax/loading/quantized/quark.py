"""AMD's Quark: https://quark.docs.amd.com, exported for Hugging Face with real quantized weights.

- fp4: `weight` uint8 [N, K / 2], `weight_scale` E8M0 [N, K / 32].
- fp8_e4m3: `weight` E4M3 [N, K], `weight_scale` one number, or one a row.
- int4, uint4: `weight` int32 [K, N / 8], `weight_scale` [G, N], `weight_zero_point` int32 [G, N / 8], the columns of a word in
  AWQ's order; int4 in two's complement.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.quantized import floats
from mlspecqd_jax.loading.quantized.awq import columns
from mlspecqd_jax.loading.quantized.codes import joined
from mlspecqd_jax.loading.quantized.grouped import Scheme, chosen, counts, packed, scheme_of
from mlspecqd_jax.loading.quantized.module import Module, Packed, Reader
from mlspecqd_jax.loading.quantized.words import one_of, table

KINDS = ("fp4", "fp8_e4m3", "int4", "uint4")


def quark(config: dict) -> Reader:
    """Return what reads a module of a checkpoint with this quantization_config.

    Raises:
      InputError: a variant that is not read.
    """
    export = table(config, "export")
    one_of(export, "weight_format", ("real_quantized",), "real_quantized")
    one_of(export, "pack_method", ("reorder",), "reorder")
    layers = [
        table(config, "global_quant_config"),
        *table(config, "layer_quant_config").values(),
        *table(config, "layer_type_quant_config").values(),
    ]
    weights = [layer["weight"] for layer in layers if isinstance(layer, dict) and layer.get("weight")]
    if not weights or not all(isinstance(weight, dict) for weight in weights):
        raise InputError(f"the quantization of weights is {brief(weights)}, but must be an object: one stage alone is read")
    schemes = {}
    for weight in weights:
        schemes.setdefault(one_of(weight, "dtype", KINDS), []).append(_scheme(weight))
    return lambda module: _read(module, schemes)


def _scheme(weight: Mapping[str, Any]) -> Scheme | None:
    if weight["dtype"] in ("int4", "uint4"):
        one_of(weight, "qscheme", ("per_group",))
        return scheme_of(dict(weight) | {"bits": 4}, "bits", "group_size")
    if weight["dtype"] == "fp4":
        one_of(weight, "scale_format", ("e8m0",))
        one_of(weight, "group_size", (32,))
    else:
        one_of(weight, "qscheme", ("per_tensor", "per_channel"))
    return None


def _read(module: Module, schemes: Mapping[str, Sequence[Scheme]]) -> Packed:
    dtype = module.tensors["weight"].dtype if "weight" in module.tensors else None
    kinds = {"U8": ("fp4",), "F8_E4M3": ("fp8_e4m3",), "I32": ("int4", "uint4")}.get(dtype, KINDS)
    meant = [kind for kind in kinds if kind in schemes]
    if len(meant) != 1:
        names = ", ".join(stored.name for stored in module.tensors.values())
        raise InputError(f"tensors {names} may be {', '.join(kinds)}, but the config says {', '.join(schemes)}")
    if meant == ["fp4"]:
        module.holds(("weight", "weight_scale"))
        return floats.mxfp4(module, "weight", "weight_scale")
    if meant == ["fp8_e4m3"]:
        module.holds(("weight", "weight_scale"))
        return floats.fp8(module, "weight", "weight_scale", tiled=False)
    return _integers(module, schemes[meant[0]], signed=meant == ["int4"])


def _integers(module: Module, schemes: Sequence[Scheme], signed: bool) -> Packed:
    module.holds(("weight", "weight_scale"), optional=("weight_zero_point",))
    n, k = module.shape
    offset = 8 if signed else 0  # two's complement to codes that begin at zero
    codes = columns(module.get("weight", ("I32",), (k, -(-n // 8)))) ^ offset
    scales = module.scales("weight_scale", *((groups, n) for groups in counts(schemes, 4, k)))
    scheme = chosen(schemes, 4, len(scales), module, "weight_scale")
    if "weight_zero_point" in module.tensors:
        zeros = columns(module.get("weight_zero_point", ("I32",), (len(scales), -(-n // 8)))) ^ offset
    else:
        zeros = np.full(scales.shape, offset, np.uint8)
    return packed(joined(codes.T, 4), np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), 4, scheme.group, k)
