"""What each weight costs in each format, measured on a model's own text, and the twin that a budget of bits makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import precision_search
from mlspecqd_jax.network.own_text import own_text
from mlspecqd_jax.network.sensitivity import costs, weights_of
from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FIRST = 0


@pytest.fixture(scope="module")
def model():
    return mlsd.load("demo-small", dtype="float32")


@pytest.fixture(scope="module")
def tokens(model):
    return own_text(model.network, model.params, jnp.full((8,), FIRST, jnp.int32), 32, jax.random.key(0))


def divergence(model, name, format, tokens):
    """The mean Kullback-Leibler divergence in nats a token that one cast weight makes, as it is, in float64."""
    w = model.params.get(name, model.params[EMBEDDING])
    start = jnp.zeros(len(tokens), jnp.int32)
    changed = model.params | {name: dequantize(quantize(w, format, "mse"), jnp.float32)}
    p, q = (
        np.asarray(jax.nn.log_softmax(model.network(params, tokens, start, None)[0]), np.float64)
        for params in (model.params, changed)
    )
    return (np.exp(p) * (p - q)).sum(-1).mean()


@pytest.mark.slow
def test_text_of_its_own_is_likely_to_it(model, tokens):
    """Drawn from its probabilities: as likely as their entropy says, and another text by another key."""
    logits, _, _ = model.network(model.params, tokens, jnp.zeros(len(tokens), jnp.int32), None)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)[:, :-1]
    said = np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], -1).mean()
    entropy = -(np.exp(log_p) * log_p).sum(-1).mean()
    assert abs(-said - entropy) < 0.35
    assert np.asarray(tokens[:, 0] == FIRST).all()
    other = own_text(model.network, model.params, tokens[:, 0], 32, jax.random.key(1))
    assert np.asarray(other != tokens).any()


@pytest.mark.slow
def test_costs_are_the_divergences_that_casting_makes(model, tokens):
    """To second order and within sampling's error; positions count as independent, which those of keys are not."""
    found = costs(model.network, model.params, tokens, ("mxfp4", "int8"), "mse", jax.random.key(2))
    assert found.keys() == weights_of(model.network, model.params).keys()
    measured = {name: divergence(model, name, "mxfp4", tokens) for name in found}
    ratios = np.array([found[name]["mxfp4"] / measured[name] for name in found])
    assert np.all((ratios > 1 / 4) & (ratios < 4))
    assert np.mean((ratios > 1 / 1.7) & (ratios < 1.7)) > 0.8
    assert 0.4 < sum(each["mxfp4"] for each in found.values()) / sum(measured.values()) < 1.6
    assert all(each["int8"] < each["mxfp4"] / 20 for each in found.values())


@pytest.mark.slow
def test_a_budget_makes_a_twin_of_so_many_bits_that_differs_less_than_one_format(tmp_path, monkeypatch, model):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    twin = model.quantized(bits=4.5)
    leaves = {name: leaf for name, leaf in twin.params.items() if isinstance(leaf, QuantizedArray)}
    number = sum(w.size for w in weights_of(model.network, model.params).values())
    taken = sum(8 * leaf.nbytes for leaf in leaves.values())
    assert 4.4 * number < taken <= 4.5 * number
    assert len({leaf.format for leaf in leaves.values()}) > 1
    assert twin.card.name == "demo-small@auto4.5"
    found = model.sensitivity()
    cost = sum(found[name][leaf.format] for name, leaf in leaves.items())
    assert cost < min(sum(each[format] for each in found.values()) for format in ("mxfp4", "nvfp4", "int4"))


@pytest.mark.slow
def test_what_was_measured_is_kept_by_the_weights(tmp_path, monkeypatch, model):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(precision_search, "costs", lambda *arguments: calls.append(arguments) or {HEAD: {"mxfp4": 1.0}})
    assert model.sensitivity() == model.sensitivity() == {HEAD: {"mxfp4": 1.0}}
    assert len(calls) == 1
    other = model.params | {EMBEDDING: model.params[EMBEDDING].at[3, 5].add(1e-3)}
    precision_search.sensitivity(model.network, other, FIRST)
    assert len(calls) == 2
    for file in (tmp_path / "mlspecqd-jax" / "sensitivity").iterdir():
        file.write_text("{")  # damaged
    model.sensitivity()
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits is 0, but must be a number of more than 0 and at most 32"),
        ({"bits": "4"}, "bits is '4', but must be a number"),
        ({"bits": 4.5, "format": "int4"}, "bits finds the formats by itself; leave format, policy and scale_rule out"),
    ],
)
def test_bad_budgets_are_refused_before_anything_is_measured(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.quantized(**arguments)


def test_too_few_bits_and_quantized_models_are_refused(tmp_path, monkeypatch, model):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = {name: {"mxfp4": 1.0} for name in weights_of(model.network, model.params)}
    monkeypatch.setattr(precision_search, "costs", lambda *arguments: measured)
    with pytest.raises(ValueError, match=r"bits is 2, but the smallest formats take 4\.25 bits a weight; give that or more"):
        model.quantized(bits=2)
    with pytest.raises(ValueError, match="quantized already"):
        model.quantized().quantized(bits=4.5)
    with pytest.raises(ValueError, match="quantized already; ask the original model"):
        model.quantized().sensitivity()
