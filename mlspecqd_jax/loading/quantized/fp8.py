"""FP8 weights of the method "fp8" (DeepSeek-V3, arXiv 2412.19437, section 3.3; AutoFP8): E4M3, times a scale despite its name.

`X.weight` E4M3 [N, K]; `X.weight_scale_inv` [N / 128, K / 128] where config.json has a weight_block_size, else one number or one a
row, which others call `X.weight_scale`.
"""

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.quantized import floats
from mlspecqd_jax.loading.quantized.module import Module, Packed, Reader
from mlspecqd_jax.loading.quantized.words import one_of

SCALES = ("weight_scale_inv", "weight_scale")


def fp8(config: dict) -> Reader:
    """Return what reads a module of a checkpoint with this quantization_config.

    Raises:
      InputError: a variant that is not read.
    """
    one_of(config, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    block = config.get("weight_block_size")
    if block not in (None, [floats.TILE, floats.TILE]):
        raise InputError(f"weight_block_size is {brief(block)}, but [128, 128] or null alone are read")
    return lambda module: _read(module, block is not None)


def _read(module: Module, tiled: bool) -> Packed:
    scales = next((kind for kind in SCALES if kind in module.tensors), SCALES[0])
    module.holds(("weight", scales))
    return floats.fp8(module, "weight", scales, tiled)
