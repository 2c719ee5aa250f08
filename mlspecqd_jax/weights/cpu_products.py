"""The C++ products of `cpu_kernels` as records beside those of `pallas_kernels`: on one CPU, of weights as they are stored."""

import functools

import jax.numpy as jnp

import cpu_kernels
from pallas_kernels import PLAIN, Product
from pallas_kernels.product import MX, STORED_AXES, as_stored
from pallas_kernels.reference import whole_blocks
from pallas_kernels.xla import DOT, decoded_matmul


def _why_not(chip, dtype, n, k, along_n, along_k, *, dtypes=("bfloat16",), unit=None):
    if chip != "cpu":
        return "needs a CPU"
    if dtype not in dtypes:
        return f"takes {', '.join(dtypes)} alone"
    if along_n * along_k > 1:
        return "cannot be split, since XLA would gather the operands of a foreign call on each device"
    if not cpu_kernels.usable(unit or dtype):
        return "needs the C++ kernels, which take a compiler, and run outside of a mesh alone"
    return None


def _every_row_by_itself(chip, dtype):
    return 1


def _run_mxfp4(x, arrays, *, n, chip, format, interpret, used=None, experts=None):
    return cpu_kernels.mxfp4_matmul(whole_blocks(x), arrays["codes"], arrays["scales"], used=used, experts=experts, n=n)


def _run_mxfp6(x, arrays, *, n, chip, format, interpret, used=None, experts=None):
    rows = {"used": used, "experts": experts, "n": n}
    return cpu_kernels.mxfp6_matmul(whole_blocks(x), **arrays, exponent_bits=format.element.exponent_bits, **rows)


def _run_grouped(x, arrays, *, n, chip, format, interpret, used=None, experts=None):
    return cpu_kernels.grouped_matmul(whole_blocks(x), **arrays, bits=format.bits, used=used, experts=experts, n=n)


def _run_mx8(x, arrays, *, n, chip, format, interpret, used=None, experts=None):
    bits = {"exponent_bits": format.element.exponent_bits, "mantissa_bits": format.element.mantissa_bits}
    return cpu_kernels.mx8_matmul(whole_blocks(x), **arrays, **bits, used=used, experts=experts, n=n)


def _run_decoded(x, arrays, *, n, chip, format, interpret, used=None):
    return decoded_matmul(whole_blocks(x), arrays, format, product=functools.partial(cpu_kernels.dense_matmul, used=used))


def _run_dense(x, arrays, *, n, chip, format, interpret, used=None, experts=None):
    return cpu_kernels.dense_matmul(x.astype(arrays["weight"].dtype), arrays["weight"], None, used, experts, n)


def _by_experts(run):
    """Return `Product.by_experts`: rows with an expert each, of which in C++ those of none cost nothing."""

    def each_row(x, experts, arrays, *, e, n, chip, format, interpret):
        x = jnp.broadcast_to(x, (*experts.shape, x.shape[-1])).reshape(-1, x.shape[-1])
        y = run(x, arrays, n=n, chip=chip, format=format, interpret=interpret, experts=experts.reshape(-1))
        return y.reshape(*experts.shape, n)

    return each_row


def _of_all(name, formats, run, why_not, axes=STORED_AXES):
    """Return the product of rows with a weight, and with those of experts."""
    return Product(name, formats, why_not, as_stored, axes, run, _every_row_by_itself, _by_experts(run))


SIZES = tuple(32 << i for i in range(10))  # of groups
GROUPED = ("nvfp4", "int8", "int4", *(f"{kind}_g{size}" for kind in ("int4", "uint4", "int8", "uint8") for size in SIZES))
GROUPED += ("int8_g16", "uint8_g16")
_why_not_of_any_dtype = functools.partial(_why_not, dtypes=("bfloat16", "float16", "float32"))
_why_not_mx, _why_not_six_bits, _why_not_grouped = (
    functools.partial(_why_not, unit=unit) for unit in ("mx", "six_bits", "grouped")
)
CPU_PRODUCTS = (
    _of_all("cpp mxfp4", MX[:1], _run_mxfp4, _why_not_mx),
    _of_all("cpp grouped", GROUPED, _run_grouped, _why_not_grouped),
    _of_all("cpp mxfp6", MX[1:3], _run_mxfp6, _why_not_six_bits),
    _of_all("cpp mx8", MX[3:], _run_mx8, _why_not_mx),
    Product("cpp decoded", None, _why_not_of_any_dtype, as_stored, STORED_AXES, _run_decoded, _every_row_by_itself),
    _of_all("cpp dense", (PLAIN,), _run_dense, _why_not_of_any_dtype, DOT.axes),
)
