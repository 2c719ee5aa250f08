"""AWQ (Lin et al., arXiv 2306.00978), as AutoAWQ's "gemm" writes it: words along N, whose fields interleave the columns.

`X.qweight` int32 [K, N / 8], `X.qzeros` int32 [G, N / 8], `X.scales` [G, N]; of the eight columns of a word, field i holds column
0, 2, 4, 6, 1, 3, 5, 7. Zeros are what they are. AWQ also moves factors from weights into norms, which are then the file's own.
"""

from collections.abc import Sequence

import numpy as np

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.quantized.codes import bytes_of, joined, split
from mlspecqd_jax.loading.quantized.grouped import Scheme, chosen, counts, packed, scheme_of
from mlspecqd_jax.loading.quantized.module import Module, Packed, Reader
from mlspecqd_jax.loading.quantized.words import one_of, table

FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)  # that hold the columns of a word in their order


def awq(config: dict) -> Reader:
    """Return what reads a module of a checkpoint with this quantization_config.

    Raises:
      InputError: a variant that is not read.
    """
    one_of(config, "version", ("gemm", "GEMM"), "gemm")
    names = {"w_bit": "bits", "q_group_size": "group_size"}
    config = {names.get(key, key): value for key, value in config.items()}
    others = [other for other in table(config, "extra_config").values() if isinstance(other, dict) and other.get("bits") != 16]
    schemes = [scheme_of(variant, "bits", "group_size") for variant in (config, *(config | other for other in others))]
    symmetric = config.get("zero_point") is False or config.get("sym") is True
    return lambda module: _read(module, schemes, symmetric)


def _read(module: Module, schemes: Sequence[Scheme], symmetric: bool) -> Packed:
    module.holds(("qweight", "qzeros", "scales"))
    n, k = module.shape
    words = module.get("qweight", ("I32",), (k, -(-n // 8)))
    scales = module.scales("scales", *((groups, n) for groups in counts(schemes, 4, k)))
    scheme = chosen(schemes, 4, len(scales), module, "scales")
    zeros = columns(module.get("qzeros", ("I32",), (len(scales), -(-n // 8))))
    if symmetric and not (zeros == 8).all():
        raise InputError(f"tensor {module.tensors['qzeros'].name} holds zeros other than 8, but the config says there are none")
    codes = joined(columns(words).T, 4)
    return packed(codes, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), 4, scheme.group, k)


def columns(words: np.ndarray) -> np.ndarray:
    """int32 [R, N / 8] to one code each, uint8 [R, N], in the order of the columns."""
    fields = split(bytes_of(words), 4)
    return fields.reshape(len(fields), -1, 8)[:, :, FIELDS].reshape(len(fields), -1)
