"""NVIDIA's ModelOpt: https://github.com/NVIDIA/Model-Optimizer, exported for Hugging Face.

- FP8: `weight` E4M3 [N, K], `weight_scale` one number, or one a row.
- NVFP4: `weight` uint8 [N, K / 2], `weight_scale` E4M3 [N, K / 16], and `weight_scale_2`, by which all is multiplied.
- MXFP4: `weight` uint8 [N, K / 2], `weight_scale` E8M0 [N, K / 32].

Older exports say it in hf_quant_config.json alone.
"""

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.quantized import floats
from mlspecqd_jax.loading.quantized.module import Module, Packed, Reader
from mlspecqd_jax.loading.quantized.words import one_of, table

FP8, NVFP4, MXFP4 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"), ("NVFP4", "W4A16_NVFP4"), ("mxfp4", "MXFP4")
MIXED = "MIXED_PRECISION"


def modelopt(config: dict) -> Reader:
    """Return what reads a module of a checkpoint with this quantization_config.

    Raises:
      InputError: an algorithm that is not read.
    """
    known = (*FP8, *NVFP4, *MXFP4)
    if one_of(config, "quant_algo", (*known, MIXED)) == MIXED:
        layers = [layer for layer in table(config, "quantized_layers").values() if isinstance(layer, dict)]
        algorithms = {one_of(layer, "quant_algo", known) for layer in layers}
    else:
        algorithms = {config["quant_algo"]}
    return lambda module: _read(module, algorithms)


def _read(module: Module, algorithms: set[str]) -> Packed:
    tensors = module.tensors
    packed = "weight" in tensors and tensors["weight"].dtype == "U8"
    e8m0 = "weight_scale" in tensors and tensors["weight_scale"].dtype in ("U8", "F8_E8M0")
    kinds = MXFP4 if packed and e8m0 else NVFP4 if packed else FP8
    if not algorithms & set(kinds):
        names = ", ".join(stored.name for stored in tensors.values())
        raise InputError(f"tensors {names} are {kinds[0]}, but the config says {', '.join(sorted(algorithms))}")
    if kinds is NVFP4:
        module.holds(("weight", "weight_scale", "weight_scale_2"))
        return floats.nvfp4(module, "weight", "weight_scale", module.factor("weight_scale_2"))
    module.holds(("weight", "weight_scale"))
    return floats.mxfp4(module, "weight", "weight_scale") if packed else floats.fp8(module, "weight", "weight_scale", tiled=False)
