"""Which product multiplies a weight on which chip: the first of `PRODUCTS` that can be had.

Support is a function of names, dtypes and shapes alone. Notation: N outputs, K contracted.
"""

import jax

from pallas_kernels import fallbacks, gpu, gpu_experts, gpu_tables, tpu, tpu_experts, tpu_tables, xla
from pallas_kernels.blocks import GPU_DEFAULT
from pallas_kernels.product import PLAIN, Product, reads
from pallas_kernels.reference import BLOCK

# The best first. What a device does with subnormal numbers is not told by its name: those that rely on them are left out where a
# device is found not to honour them.
PRODUCTS = (
    tpu.DECODE,
    tpu.DECODE_WITHOUT_SUBNORMALS,
    tpu_tables.TABLE,
    tpu_tables.TABLE_WITHOUT_SUBNORMALS,
    gpu.DECODE,
    gpu_tables.TABLE,
    fallbacks.GROUPED,
    fallbacks.REDUCED,
    xla.DECODED,
    xla.DOT,
)
RELYING_ON_SUBNORMALS = (tpu.DECODE, tpu_tables.TABLE)
OF_EXPERTS = tuple(product for product in PRODUCTS if product.by_experts)  # of quantized weights
OF_PLAIN_EXPERTS = (tpu_experts.EXPERTS, gpu_experts.EXPERTS)


def chip_of(device: jax.Device) -> str:
    """Return what decides which products a device supports: a TPU's kind, an NVIDIA GPU's "sm_90", or the platform."""
    if device.platform == "gpu" and "." in getattr(device, "compute_capability", ""):
        return "sm_" + device.compute_capability.replace(".", "")
    return device.device_kind if device.platform == "tpu" else device.platform


def chip_in_use() -> str:
    """Return the chip for which a program is traced: that of this process's devices, or one that a mesh describes.

    Of an NVIDIA GPU that is only described the compute capability is not told; it is taken for a recent one's.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    here = jax.devices()[0]
    if described is None or described.platform == here.platform:
        return chip_of(here)
    return described.device_kind if described.platform == "tpu" else GPU_DEFAULT


def named(name: str) -> Product:
    """Return the product of this name, which there must be."""
    return next(product for product in PRODUCTS if product.name == name)


def why_not(
    name: str,
    chip: str,
    dtype: str,
    n: int,
    k: int,
    along_n: int = 1,
    along_k: int = 1,
    *,
    format: str = "mxfp4",
    products: tuple[Product, ...] = PRODUCTS,
) -> str | None:
    """Return why a product cannot be had, in one sentence, or None if it can.

    Args:
      name: of a product.
      chip: of `chip_of`.
      dtype: of the activations.
      n, k: of the weight.
      along_n, along_k: over how many devices the weight is split along N and along K.
      format: of the weight.
      products: those that there are.
    """
    kind = "a plain" if format == PLAIN else f"an {format.upper()}"
    asked = f"the product '{name}' for {dtype} [M, {k}] and {kind} weight [{n}, {k}] on {chip}"
    product = next((product for product in products if product.name == name), None)
    if product is None:
        return f"there is no product '{name}'; give one of {', '.join(product.name for product in products)}"
    if not reads(product, format):
        return f"{asked} reads {', '.join(product.formats or ('quantized weights',))} alone"
    if n % along_n:
        return f"{asked} cannot be split over {along_n} devices along N; keep N whole or split it evenly"
    if along_k > 1 and k % (BLOCK * along_k):
        return f"{asked} cannot be split over {along_k} devices along K, since MX blocks of {BLOCK} would be; keep K whole"
    reason = product.why_not(chip, dtype, n, k, along_n, along_k)
    return None if reason is None else f"{asked} {reason}"


def best_product(
    chip: str,
    dtype: str,
    n: int,
    k: int,
    along_n: int = 1,
    along_k: int = 1,
    *,
    format: str = "mxfp4",
    products: tuple[Product, ...] = PRODUCTS,
) -> Product | None:
    """Return the first product that can be had, or None; the arguments are those of `why_not`.

    One can always be had where the weight is whole.
    """
    wanted = (chip, dtype, n, k, along_n, along_k)
    return next((product for product in products if why_not(product.name, *wanted, format=format, products=products) is None), None)
