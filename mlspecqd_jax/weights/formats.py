"""The formats of quantized weights, one row each.

A format here is one thing; its cast (`cast`) and the products that read it (`products`) are looked up by its name. With code q of
an element, scale s and minimum m of its group, what is stored stands for

    element(q) * s + m

A code of eight bits lies in a byte. Two of four bits share one, element 2i in the low half of byte i. 32 codes of six bits lie in
24 bytes: 16 with their lower four bits, element i in the low half of byte i and element i + 16 in the high half, and 8 with their
upper two, element 8f + i in bits 2f and 2f + 1 of byte i. `mx.stored_codes` writes this, `pallas_kernels.unpacked` reads it.

Sources: OCP Microscaling Formats (MX) v1.0, section 5, for the formats with "mx"; NVIDIA's NVFP4, small floats in groups of 16
whose scales are E4M3, times one number for the whole weight; and integers in groups, as GPTQ, AWQ and llama.cpp have them.
"""

import re
from typing import NamedTuple

from mlspecqd_jax.errors import InputError


class Element(NamedTuple):
    """A small floating-point type: a sign, exponent bits with bias 2^(exponent_bits - 1) - 1, mantissa bits."""

    exponent_bits: int
    mantissa_bits: int
    emax: int  # exponent of the largest value
    largest: float
    dtype: str | None  # XLA's name for it, if it has one

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1


class Integer(NamedTuple):
    """An integer of so many bits: its code less an offset."""

    bits: int
    offset: int


class Format(NamedTuple):
    """How a weight [N, K] is stored: a code for each element, and a scale for each group of them along K."""

    name: str
    element: Element | Integer
    group: int | None = 32  # elements that share a scale; None is a whole row
    scale: str = "e8m0"  # a name of `SCALE_DTYPES`; of e8m0 a byte s is 2^(s - 127), of e4m3 it is that number
    minimum: bool = False  # whether a group has one, in float16
    rows: int = 1  # outputs that share the scales of a row

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.element.bits

    def code_bytes(self, k: int) -> int:
        """Return how many bytes the codes of k elements of a row take, k a multiple of `STEP`."""
        return k * self.bits // 8

    def nbytes(self, n: int, k: int) -> int:
        """Return how many bytes a weight [n, k] takes as it is stored."""
        filled = k + -k % STEP
        groups = -(-n // self.rows) * -(-filled // (self.group or filled))
        whole = SCALE_BYTES["float32"] if self.scale == "e4m3" else 0  # the number of which such scales are multiples
        return n * self.code_bytes(filled) + groups * (SCALE_BYTES[self.scale] + 2 * self.minimum) + whole


SCALE_DTYPES = {"e8m0": "uint8", "e4m3": "uint8", "float16": "float16", "float32": "float32"}
SCALE_BYTES = {"e8m0": 1, "e4m3": 1, "float16": 2, "float32": 4}
STEP = 32  # elements: what K is filled up to a multiple of, with elements that are zero
E2M1, E4M3 = Element(2, 1, 2, 6.0, "float4_e2m1fn"), Element(4, 3, 8, 448.0, "float8_e4m3fn")
MX = (
    Format("mxfp4", E2M1),
    Format("mxfp6_e2m3", Element(2, 3, 2, 7.5, None)),
    Format("mxfp6_e3m2", Element(3, 2, 4, 28.0, None)),
    Format("mxfp8_e4m3", E4M3),
    Format("mxfp8_e5m2", Element(5, 2, 15, 57344.0, "float8_e5m2")),
)
SCALED = (
    Format("nvfp4", E2M1, 16, "e4m3"),
    Format("int4", Integer(4, 8), 32, "float16"),
    Format("int4_g64", Integer(4, 8), 64, "float16"),
    Format("int4_g128", Integer(4, 8), 128, "float16"),
    Format("uint4_g32", Integer(4, 0), 32, "float16", minimum=True),
    Format("uint4_g128", Integer(4, 0), 128, "float16", minimum=True),
    Format("int8", Integer(8, 128), None, "float32"),
    Format("fp8_e4m3", E4M3, None, "float32"),
    Format("fp8_e4m3_128x128", E4M3, 128, "float32", rows=128),
)
FORMATS = {format.name: format for format in MX + SCALED}


def format_of(name: str) -> Format:
    """Return the format of this name: one of `FORMATS`, or integers in groups of any size, which files of others hold.

    Such a name is int or uint (which has minima), 4 or 8 bits, and _g with a multiple of 16: `int8_g32`.

    Raises:
      InputError: there is no such format.
    """
    if name in FORMATS:
        return FORMATS[name]
    found = re.fullmatch(r"(u?)int([48])_g([1-9]\d{0,4})", name)
    if found is None or int(found[3]) % 16:
        raise InputError(f"'{name}' is not a format for weights; give one of {', '.join(FORMATS)}")
    bits = int(found[2])
    return Format(name, Integer(bits, 0 if found[1] else 2 ** (bits - 1)), int(found[3]), "float16", minimum=bool(found[1]))


def check_format(format: str) -> None:
    """Raise an InputError unless `format` is the name of a format."""
    format_of(format)
