"""Recorded logits and layers of transformers' torch models, and how far from them ours may be."""

import functools
import pathlib

import numpy as np
import pytest
import tiny

# Errors are relative to the largest reference value: two f32 programs that add in another order differ by about 1e-6 of it, while a
# wrong mask, angle or axis moves it by more than a hundredth (`test_a_wrong_layer_is_told_apart`).
TOLERANCE = 1e-4

families = pytest.mark.parametrize("family", list(tiny.FAMILIES))


def error(ours, reference) -> float:
    ours, reference = np.asarray(ours, np.float32), np.asarray(reference, np.float32)
    assert ours.shape == reference.shape
    return float(np.max(np.abs(ours - reference)) / np.max(np.abs(reference)))


@functools.cache
def reference(family) -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(__file__).parent / "reference" / f"{family}.npz") as recorded:
        return dict(recorded)
