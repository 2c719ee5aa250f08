"""Rounding with compensation: against the paper's algorithm in float64, in every format, and with nothing to make up for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlspecqd_jax.weights.calibration import DAMPINGS, calibrated, influence
from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.formats import FORMATS

pytestmark = pytest.mark.usefixtures("compiled_quickly")

N, K = 24, 72  # K is a multiple of no group
QUICK = [("nvfp4", "mse"), ("uint4_g32", "floor")]  # each compiles a program
OTHERS = {(name, rule) for name in FORMATS for rule in ("floor", "mse")} | {("mxfp6_e2m3", "ceil")}
FORMATS_AND_RULES = [*QUICK, *(pytest.param(*other, marks=pytest.mark.slow) for other in sorted(OTHERS - set(QUICK)))]
# By module, so that one program after another serves all tests.
each_format = pytest.mark.parametrize(("format", "scale_rule"), FORMATS_AND_RULES, scope="module")


@pytest.fixture(scope="module")
def w():
    return jax.random.normal(jax.random.key(0), (N, K)) * 0.02


@pytest.fixture(scope="module")
def h():
    """Of inputs of which each is much like those around it."""
    mixed = np.exp(-np.abs(np.subtract.outer(np.arange(K), np.arange(K))) / 4)
    x = np.random.default_rng(1).standard_normal((300, K)) @ mixed
    return jnp.asarray(x.T @ x, jnp.float32)


def error(w, h, leaf) -> float:
    e = np.asarray(dequantize(leaf, jnp.float32), np.float64) - np.asarray(w, np.float64)
    return np.einsum("nk,kl,nl->", e, np.asarray(h, np.float64), e)


def equal(one, other) -> bool:
    same = jax.tree.map(np.array_equal, one, other)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(jax.tree.leaves(same))


def gptq(w, h, group, cast):
    """The paper's algorithm as it is written, in float64: errors are spread by the Cholesky factor of the inverse.

    Args:
      w: [N, K].
      h: [K, K].
      group: columns that share a scale.
      cast: (columns of a group) -> function of (values, place in the group) -> their nearest.
    """
    w, h = np.array(w, np.float64), np.array(h, np.float64)
    h += DAMPINGS[0] * np.mean(np.diag(h)) * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    q = np.zeros_like(w)
    for first in range(0, w.shape[1], group):
        nearest = cast(w[:, first : first + group])
        for j in range(first, min(first + group, w.shape[1])):
            q[:, j] = nearest(w[:, j])
            w[:, j:] -= np.outer((w[:, j] - q[:, j]) / upper[j, j], upper[j, j:])
    return q


def e2m1(values):
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return np.sign(values) * grid[np.argmin(np.abs(np.abs(values)[:, None] - grid), axis=1)]


def mxfp4(columns):
    scale = 2.0 ** (np.floor(np.log2(np.abs(columns).max(axis=1))) - 2)
    return lambda values: e2m1(values / scale) * scale


def uint4(columns):
    least, most = columns.min(axis=1), columns.max(axis=1)
    least, step = np.float64(np.float16(least)), np.float64(np.float16((most - least) / 15))
    return lambda values: np.clip(np.rint((values - least) / step), 0, 15) * step + least


@pytest.mark.parametrize(("format", "cast"), [("mxfp4", mxfp4), ("uint4_g32", uint4)])
def test_it_is_the_paper_s_algorithm(w, h, format, cast):
    expected = gptq(w, h, 32, cast)
    found = np.asarray(dequantize(calibrated(w, influence(h), format), jnp.float32), np.float64)
    assert np.abs(found - w).max() > 1e-4
    # Float32 may decide a number between two of the grid otherwise, and with it what is made up for later in that row.
    rows = np.mean(np.all(np.abs(found - expected) < 1e-6, axis=1))
    assert rows > 0.9


@each_format
def test_outputs_are_nearer_than_those_of_a_cast(w, h, format, scale_rule):
    leaf = calibrated(w, influence(h), format, scale_rule)
    plain = quantize(w, format, scale_rule)
    assert jax.tree.structure(leaf) == jax.tree.structure(plain)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(leaf)] == [(x.shape, x.dtype) for x in jax.tree.leaves(plain)]
    assert error(w, h, leaf) < 0.85 * error(w, h, plain)


@each_format
def test_inputs_that_know_nothing_of_each_other_give_the_cast(w, format, scale_rule):
    assert equal(calibrated(w, influence(jnp.eye(K)), format, scale_rule), quantize(w, format, scale_rule))


def test_rows_know_nothing_of_each_other(w, h, monkeypatch):
    whole = calibrated(w, influence(h), "nvfp4", "mse")
    monkeypatch.setattr("mlspecqd_jax.weights.calibration.ELEMENTS", N // 2 * K)
    assert equal(calibrated(w, influence(h), "nvfp4", "mse"), whole)


def test_inputs_that_are_always_zero_and_those_that_repeat_others(w, h):
    """No column moves for one that is never read; a matrix of less than full rank has a factor once it is damped."""
    dead = h.at[5].set(0).at[:, 5].set(0)
    t = influence(dead).spread
    assert not np.any(t[5])
    assert not np.any(t[:, 5])
    x = jax.random.normal(jax.random.key(1), (3, K))
    found = influence(x.T @ x)
    assert np.isfinite(found.spread).all()
    assert error(w, x.T @ x, calibrated(w, found)) < error(w, x.T @ x, quantize(w))


def test_what_has_no_factor_is_told():
    assert influence(jnp.zeros((8, 8))) is None
    assert influence(jnp.eye(8).at[3, 3].set(jnp.nan)) is None
    assert influence(jnp.eye(8).at[3, 3].set(-20)) is None


@pytest.mark.parametrize(
    ("value", "format", "scale_rule", "message"),
    [
        (0.0, "int3", "floor", "'int3' is not a format for weights"),
        (0.0, "int4", "ceil", "the scale rule 'ceil' is of MX formats alone"),
        (jnp.inf, "mxfp4", "floor", r"a weight of shape \[2, 32\] holds NaN or infinity"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(value, format, scale_rule, message):
    with pytest.raises(ValueError, match=message):
        calibrated(jnp.full((2, 32), value), influence(jnp.eye(32)), format, scale_rule)
