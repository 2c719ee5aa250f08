"""The formats of quantized weights, one row each.

Source: OCP Microscaling Formats (MX) v1.0, section 5. A format here is one thing; its cast (`mx`) and the products that read it
(`products`) are looked up by its name.
"""

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


class Format(NamedTuple):
    """How a weight [N, K] is stored: a code for each element, and a scale for each group of them along K."""

    name: str
    element: Element
    group: int = 32  # elements that share a scale
    scale: str = "e8m0"  # a byte s is 2^(s - 127)

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.element.bits

    @property
    def codes_per_byte(self) -> int:
        """Two codes of four bits share a byte, element 2i in its low half; others take one each, in the low bits."""
        return 2 if self.bits == 4 else 1


FORMATS = {
    format.name: format
    for format in (
        Format("mxfp4", Element(2, 1, 2, 6.0, "float4_e2m1fn")),
        Format("mxfp6_e2m3", Element(2, 3, 2, 7.5, None)),
        Format("mxfp6_e3m2", Element(3, 2, 4, 28.0, None)),
        Format("mxfp8_e4m3", Element(4, 3, 8, 448.0, "float8_e4m3fn")),
        Format("mxfp8_e5m2", Element(5, 2, 15, 57344.0, "float8_e5m2")),
    )
}


def check_format(format: str) -> None:
    """Raise an InputError unless `format` is a name of `FORMATS`."""
    if format not in FORMATS:
        raise InputError(f"'{format}' is not a format for weights; give one of {', '.join(FORMATS)}")
