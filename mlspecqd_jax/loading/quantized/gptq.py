"""GPTQ (Frantar et al., arXiv 2210.17323), as AutoGPTQ and GPTQModel write it: words along K, zeros along N in two spellings.

`X.qweight` int32 [K * b / 32, N], `X.qzeros` int32 [G, N * b / 32], `X.scales` [G, N], and `X.g_idx` int32 [K], the group of each
input, where groups follow the order in which the inputs were quantized (act-order).

Version 1 stores every zero less one, which its writers subtract from whole words: a zero of 0 borrows from the next field, and
adding to whole words undoes it. Which version a file is of, its config may tell wrongly; where weights are symmetric the zeros do.
"""

from collections.abc import Sequence

import numpy as np

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.quantized.codes import bytes_of, filled, joined, split
from mlspecqd_jax.loading.quantized.grouped import BITS, Scheme, chosen, counts, order_of, packed, scheme_of
from mlspecqd_jax.loading.quantized.module import Module, Packed, Reader
from mlspecqd_jax.loading.quantized.words import one_of, table

FORMATS = ("gptq", "gptq_v2")


def gptq(config: dict) -> Reader:
    """Return what reads a module of a checkpoint with this quantization_config.

    Raises:
      InputError: a variant that is not read.
    """
    one_of(config, "is_marlin_format", (False,), False)
    one_of(config, "pack_dtype", ("int32",), "int32")
    one_of(config, "format", FORMATS, "gptq")
    version = one_of(config, "checkpoint_format", FORMATS, config.get("format") or "gptq")
    # Settings of single layers: which of them is meant, the tensors say.
    others = [value for value in (*table(config, "dynamic").values(), *table(config, "extra_config").values()) if value]
    known = {key: config[key] for key in ("bits", "group_size", "sym") if key in config}
    variants = [known, *(known | other for other in others if isinstance(other, dict) and other.get("bits") != 16)]
    schemes = [scheme_of(variant, "bits", "group_size", "sym") for variant in variants]
    return lambda module: _read(module, schemes, version)


def _read(module: Module, schemes: Sequence[Scheme], version: str) -> Packed:
    module.holds(("qweight", "qzeros", "scales"), optional=("g_idx",))
    n, k = module.shape
    words = module.get("qweight", ("I32",), *((-(-k * bits // 32), n) for bits in BITS))
    bits = next(bits for bits in BITS if len(words) == -(-k * bits // 32))
    scales = module.scales("scales", *((groups, n) for groups in counts(schemes, bits, k)))
    scheme = chosen(schemes, bits, len(scales), module, "scales")
    zeros = _zeros(module, scheme, len(scales), version)
    codes, order = bytes_of(words.T), order_of(module, "g_idx", len(scales), scheme.group or k)
    stored = filled(codes, bits, k) if order is None else joined(split(codes, bits)[:, order], bits)
    return packed(stored, np.ascontiguousarray(scales.T), zeros, bits, scheme.group, k, order)


def _zeros(module: Module, scheme: Scheme, groups: int, version: str) -> np.ndarray | None:
    """Return the zeros, uint8 [N, G], or None for half of the range throughout."""
    n, bits = module.shape[0], scheme.bits
    words = module.get("qzeros", ("I32",), (groups, -(-n * bits // 32)))
    half, stored = 1 << bits - 1, split(bytes_of(words), bits)[:, :n]
    if scheme.symmetric is not False and any((stored == value).all() for value in (half - 1, half)):
        return None
    if scheme.symmetric:
        name = module.tensors["qzeros"].name
        raise InputError(f"tensor {name} holds zeros other than {half - 1} or {half} throughout, but the config says sym")
    if version == "gptq":
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        words = (np.ascontiguousarray(words).view(np.uint32) + ones).view(np.int32)
    return np.ascontiguousarray(split(bytes_of(words), bits)[:, :n].T)
