"""AutoRound (Cheng et al., arXiv 2309.05516), which packs as GPTQ or AWQ do and says which."""

from mlspecqd_jax.loading.quantized.awq import awq
from mlspecqd_jax.loading.quantized.gptq import gptq
from mlspecqd_jax.loading.quantized.module import Reader
from mlspecqd_jax.loading.quantized.words import one_of

PACKINGS = ("auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq")


def auto_round(config: dict) -> Reader:
    """Return what reads a module of a checkpoint with this quantization_config.

    Raises:
      InputError: a packing that is not read.
    """
    packing = one_of(config, "packing_format", PACKINGS)
    if packing == "auto_round:auto_awq":
        return awq(config)
    return gptq(config | {"checkpoint_format": "gptq_v2" if packing == "auto_round:gptqmodel" else "gptq"})
