"""The quantizer against torchao's, bit for bit: codes and scales of every format by every scale rule."""

import ml_dtypes
import numpy as np
import pytest
from test_mx import blocks_of, codes_of, finite_values

from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.formats import MX
from mlspecqd_jax.weights.mx import SCALE_RULES

pytestmark = pytest.mark.torch
FORMATS = [format.name for format in MX]


@pytest.fixture(scope="module")
def to_mx():
    torch = pytest.importorskip("torch")
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    names = ("float4_e2m1fn_x2", "fp6_e2m3", "fp6_e3m2", "float8_e4m3fn", "float8_e5m2")
    elements = {format: getattr(torch, name, name) for format, name in zip(FORMATS, names, strict=True)}

    def to_mx(w, format, rule):
        """Return (codes as stored, scales) as uint8."""
        tensor = torch.from_numpy(np.asarray(w, np.float32)).to(getattr(torch, w.dtype.name))
        scales, codes = mx.to_mx(tensor, elements[format], 32, mx.ScaleCalculationMode[rule.upper()])
        return codes.view(torch.uint8).numpy(), scales.view(torch.uint8).numpy()

    return to_mx


def f32_values() -> np.ndarray:
    """Blocks of 32 like magnitudes [256, 128], from everywhere in float32."""
    random = np.random.RandomState(4)
    w = random.standard_normal((256, 4, 32)) * 2.0 ** random.randint(-140, 120, (256, 4, 1))
    return w.reshape(256, 128).astype(np.float32)


@pytest.mark.parametrize("values", ["bfloat16", "float32"])
@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("format", list(FORMATS))
def test_codes_and_scales(to_mx, format, rule, values):
    w = blocks_of(finite_values(ml_dtypes.bfloat16)) if values == "bfloat16" else f32_values()
    ours = quantize(w, format, rule)
    codes, scales = to_mx(w, format, rule)
    np.testing.assert_array_equal(ours.arrays["scales"], scales)
    # (By rceil torchao rounds log2 to float32 and may miss that a float32 amax exceeds the turn by an ulp; none here is so close.)
    # Where the scale byte is 0 torchao divides by 2^-126, the least normal float32 (by rceil: not at all), not by the 2^-127 that
    # the byte stands for; all that remains of such a block after decoding is zero. A block of zeros has the same codes.
    blocks = w.astype(np.float64).reshape(len(w), -1, 32)
    scaled = ((scales > 0) | ~blocks.any(axis=-1)).repeat(32, 1)
    theirs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(w.shape) if format == "mxfp4" else codes
    assert scaled.sum() > 0.8 * scaled.size
    np.testing.assert_array_equal(codes_of(ours)[scaled], theirs[scaled])


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_block_of_zeros(to_mx, format):
    w = np.zeros((1, 32), np.float32)
    ours, (codes, scales) = quantize(w, format, "rceil"), to_mx(w, format, "rceil")
    np.testing.assert_array_equal(ours.arrays["scales"], scales)
    assert not codes.any()
    assert not codes_of(ours).any()
