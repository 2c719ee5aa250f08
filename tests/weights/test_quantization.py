"""Twins: which weights are quantized, what is shared, what it costs, and that nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mlspecqd_jax as mlsd
from mlspecqd_jax.weights import quantization
from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.formats import FORMATS
from mlspecqd_jax.weights.quantization import quantize_params
from mlspecqd_jax.weights.quantized_array import QuantizedArray

pytestmark = pytest.mark.usefixtures("compiled_quickly")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# K is a multiple of 32 everywhere, so that products with decoded weights are the same operations; few shapes compile quickly.
EVEN = tiny.FAMILIES["qwen3_bias"] | {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 16}
EVEN |= {"num_hidden_layers": 2, "max_window_layers": 1}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def load(config, dtype="float32"):
        return mlsd.load(tiny.write_checkpoint(tmp_path_factory.mktemp("model"), config, tiny.weights(config)), dtype=dtype)

    return load


@pytest.fixture(scope="module")
def untied(load):
    return load(EVEN)


@pytest.fixture(scope="module")
def tied(load):
    return load(tiny.FAMILIES["llama3"] | {"num_hidden_layers": 1})


def is_quantized(leaf):
    return isinstance(leaf, QuantizedArray)


def equal(one, other) -> bool:
    same = jax.tree.map(np.array_equal, one, other)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(jax.tree.leaves(same))


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def apply(network, params, tokens):
    return network(params, tokens, jnp.zeros(len(tokens), jnp.int32), None)[0]


def logits(model, params=None):
    return np.asarray(apply(model.network, model.params if params is None else params, tiny.tokens()))


def cosine(a, b) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_linear_layers_and_head_are_quantized_and_the_rest_is_shared(request, name):
    model = request.getfixturevalue(name)
    twin = model.quantized()
    for name, leaf in twin.params.items():
        if name.endswith("_proj.weight") or name == HEAD:
            source = model.params.get(name, model.params[EMBEDDING])
            format = "mxfp8_e4m3" if name not in model.params else "mxfp4"
            assert leaf.format == format
            assert leaf.shape == source.shape
            assert equal(leaf, quantize(source, format))
        else:
            assert leaf is model.params[name]
    assert list(twin.params) == [*model.params, *([] if HEAD in model.params else [HEAD])]
    assert not any(map(is_quantized, model.params.values()))


def test_the_twin_is_the_same_model_otherwise(untied):
    twin = untied.quantized("mxfp6_e3m2", scale_rule="even")
    assert twin.network is untied.network
    assert twin.folder == untied.folder
    assert twin.card == dataclasses.replace(untied.card, name=f"{untied.card.name}@mxfp6_e3m2")
    assert twin.num_parameters == untied.num_parameters
    assert equal(twin.params[HEAD], quantize(untied.params[HEAD], "mxfp6_e3m2", "even"))


def test_a_twin_is_its_own_twin_and_no_other_s(untied):
    policy = {HEAD: "mxfp8_e4m3"}
    for arguments in ({}, {"format": "mxfp8_e5m2"}, {"policy": policy}, {"scale_rule": "ceil"}):
        twin = untied.quantized(**arguments)
        assert twin.quantized(**arguments) is twin
    for other in ({"format": "mxfp8_e5m2"}, {"policy": policy}, {"scale_rule": "ceil"}):
        with pytest.raises(ValueError, match=r"is quantized already .*; quantize the original model instead"):
            untied.quantized().quantized(**other)


def test_elsewhere_than_on_cpu_a_tied_head_has_the_one_format_that_has_a_product_there():
    assert quantization.default_policy("mxfp4", True, "cpu") == {HEAD: "mxfp8_e4m3"}
    assert quantization.default_policy("mxfp4", True, "gpu") == quantization.default_policy("mxfp4", False, "cpu") == {}
    assert quantization.default_policy("mxfp8_e5m2", True, "cpu") == {}


def test_leaves_in_the_wanted_format_stay_and_others_are_refused(untied):
    tensors = untied.network.tensors()
    first = quantize_params(untied.params, tensors, policy={HEAD: None})
    second = quantize_params(first, tensors)
    assert all(second[name] is leaf for name, leaf in first.items() if name != HEAD)
    assert second[HEAD].format == "mxfp4"
    with pytest.raises(ValueError, match=r"_proj.weight is in mxfp4 already and cannot become mxfp8_e5m2; quantize the original"):
        quantize_params(first, tensors, "mxfp8_e5m2")


def test_policy(untied):
    name = "model.layers.1.mlp.up_proj.weight"
    policy = {"model.layers.0.*": None, name: "mxfp8_e4m3", "model.layers.1.mlp.*": "mxfp6_e2m3", "*k_proj*": None}
    params = untied.quantized(policy=policy).params
    for other, leaf in params.items():
        if other.startswith("model.layers.0."):
            assert leaf is untied.params[other]
    assert params[name].format == "mxfp8_e4m3"
    assert params["model.layers.1.mlp.down_proj.weight"].format == "mxfp6_e2m3"
    assert params["model.layers.1.self_attn.k_proj.weight"] is untied.params["model.layers.1.self_attn.k_proj.weight"]
    assert params["model.layers.1.self_attn.v_proj.weight"].format == params[HEAD].format == "mxfp4"


def test_a_tied_head(tied):
    """It is cast less coarsely in MXFP4 twins, unless a policy is given, an empty one too."""
    assert equal(tied.quantized().params[HEAD], quantize(tied.params[EMBEDDING], "mxfp8_e4m3"))
    assert equal(tied.quantized(policy={}).params[HEAD], quantize(tied.params[EMBEDDING]))
    assert equal(tied.quantized(policy={"*k_proj*": None}).params[HEAD], quantize(tied.params[EMBEDDING]))
    assert tied.quantized("mxfp6_e3m2").params[HEAD].format == "mxfp6_e3m2"
    assert tied.quantized().quantized().recipe.policy == ((HEAD, "mxfp8_e4m3"),)
    assert tied.quantized().params[EMBEDDING] is tied.params[EMBEDDING]
    assert tied.quantized(policy={HEAD: "mxfp8_e4m3"}).params[HEAD].format == "mxfp8_e4m3"
    assert list(tied.quantized(policy={"lm_*": None}).params) == list(tied.params)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"format": "mxfp5"},
            "'mxfp5' is not a format for weights; give one of mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8_e4m3, mxfp8_e5m2",
        ),
        ({"format": None}, "format is None, but must be the name of a format"),
        ({"policy": {HEAD: "int3"}}, "'int3' is not a format for weights; give one of mxfp4"),
        (
            {"policy": {"model.layers.7.*": None}},
            r"'model.layers.7.\*' matches no weight that can be quantized; these can: \*_proj",
        ),
        ({"policy": {EMBEDDING: "mxfp4"}}, "matches no weight that can be quantized"),
        ({"scale_rule": "nearest"}, "'nearest' is not a scale rule; give one of floor, ceil, rceil, even"),
    ],
)
def test_bad_requests_are_refused_before_a_weight_is_touched(untied, monkeypatch, arguments, words):
    monkeypatch.setattr(quantization, "quantize", None)
    with pytest.raises(ValueError, match=words) as caught:
        untied.quantized(**arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_bytes(untied):
    """4.25 bits an element where K is a multiple of 32."""
    bf16 = {name: leaf.astype(jnp.bfloat16) for name, leaf in untied.params.items()}
    twin = dataclasses.replace(untied, params=bf16).quantized()
    cast = {name: leaf for name, leaf in twin.params.items() if is_quantized(leaf)}
    assert sum(leaf.nbytes for leaf in cast.values()) <= 0.27 * sum(bf16[name].nbytes for name in cast)
    assert twin.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(twin.params))


def test_bytes_of_real_weights(shared):
    """The padding of K = 172 to 192 costs a little."""
    model = mlsd.load(shared / "models" / "stories260K")
    cast = {name: leaf for name, leaf in model.quantized(policy={}).params.items() if is_quantized(leaf)}
    bf16 = sum(model.params.get(name, model.params[EMBEDDING]).nbytes for name in cast)
    assert abs(sum(leaf.nbytes for leaf in cast.values()) / bf16 - 0.2722) < 1e-4


def test_no_second_model_in_memory(untied, monkeypatch):
    """Before each weight is cast, what was made so far is quantized leaves and nothing else."""
    made = []

    def watched(w, *arguments):
        extra = sum(x.nbytes for x in jax.live_arrays()) - before
        assert extra <= sum(leaf.nbytes for leaf in made)
        made.append(quantize(w, *arguments))
        return made[-1]

    monkeypatch.setattr(quantization, "quantize", watched)
    before = sum(x.nbytes for x in jax.live_arrays())
    twin = untied.quantized()
    assert len(made) == sum(map(is_quantized, twin.params.values())) == 7 * 2 + 1


@pytest.mark.parametrize(
    "format", [pytest.param(name, marks=() if name in ("mxfp4", "uint4_g128", "int8") else pytest.mark.slow) for name in FORMATS]
)
def test_logits_are_those_of_the_target_with_decoded_weights(untied, format):
    twin = untied.quantized(format)
    decoded = {name: dequantize(leaf, jnp.float32) if is_quantized(leaf) else leaf for name, leaf in twin.params.items()}
    ours, target = logits(twin), logits(untied)
    if FORMATS[format].scale == "e8m0":
        np.testing.assert_array_equal(ours, logits(untied, decoded))
    else:  # scales that are no powers of two come to the sums where a row or the weight has one
        np.testing.assert_allclose(ours, logits(untied, decoded), atol=1e-4)
    similar = cosine(ours, target)
    least = {"mxfp4": 0.8, "mxfp6_e3m2": 0.98, "mxfp8_e5m2": 0.98, "int8": 0.9995}
    assert least.get(format, 0.99 if FORMATS[format].bits > 4 else 0.85) < similar < (0.999999 if format == "int8" else 0.99999)


def test_a_tied_twin_scores_with_its_own_head(tied):
    """K is no multiple of 32 here, so that sums are taken in another order."""
    twin = tied.quantized()
    decoded = {name: dequantize(leaf, jnp.float32) if is_quantized(leaf) else leaf for name, leaf in twin.params.items()}
    np.testing.assert_allclose(logits(twin), logits(tied, decoded), atol=1e-4)
    without = {name: leaf for name, leaf in twin.params.items() if name != HEAD}
    assert np.abs(logits(twin) - logits(tied, without)).max() > 0.01
