"""The C++ products of `cpu_kernels` as records beside those of `pallas_kernels`: on one CPU, of weights as they are stored."""

import functools

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


SIZES = tuple(32 << i for i in range(10))  # of groups
GROUPED = ("nvfp4", "int8", "int4", *(f"{kind}_g{size}" for kind in ("int4", "uint4", "int8", "uint8") for size in SIZES))
GROUPED += ("int8_g16", "uint8_g16")
_why_not_of_any_dtype = functools.partial(_why_not, dtypes=("bfloat16", "float16", "float32"))
_why_not_mx, _why_not_six_bits, _why_not_grouped = (
    functools.partial(_why_not, unit=unit) for unit in ("mx", "six_bits", "grouped")
)
_MXFP4 = Product("cpp mxfp4", MX[:1], _why_not_mx, as_stored, STORED_AXES, _run_mxfp4, _every_row_by_itself, by_experts=True)
CPU_PRODUCTS = (
    _MXFP4,
    _MXFP4._replace(name="cpp grouped", formats=GROUPED, why_not=_why_not_grouped, run=_run_grouped),
    _MXFP4._replace(name="cpp mxfp6", formats=MX[1:3], why_not=_why_not_six_bits, run=_run_mxfp6),
    _MXFP4._replace(name="cpp mx8", formats=MX[3:], run=_run_mx8),
    _MXFP4._replace(name="cpp decoded", formats=None, why_not=_why_not_of_any_dtype, run=_run_decoded, by_experts=False),
    Product("cpp dense", (PLAIN,), _why_not_of_any_dtype, as_stored, DOT.axes, _run_dense, _every_row_by_itself, by_experts=True),
)
