"""Drafters as the command line spells them."""

import pytest
import quantized_folders
from refusals import refused

import mlspecqd_jax as mlsd
from mlspecqd_jax import specs, stacks
from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def test_specs_spell_drafters(demo):
    loaded = []

    def load(name):
        loaded.append(name)
        return demo

    def pairs(*given):
        return specs.drafters(specs.parse(given), demo, load)

    assert pairs("none") == []
    [(twin, length)] = pairs("mxfp4")
    assert (twin.card.name, length) == ("demo@mxfp4", 15)  # as many as pay, up to that
    assert [length for _, length in pairs("mxfp4", "mxfp8_e4m3")] == [15, 7]
    assert [specs.lengths(specs.parse(given)) for given in (["mxfp4", "ngram"], ["mxfp4:3", "ngram"], ["none"])] == [
        "auto",
        "fixed",
        "fixed",
    ]
    found = pairs("mxfp8_e4m3:8", "mxfp4", "ngram")
    assert [(stacks.name_of(drafter), length) for drafter, length in found] == [
        ("demo@mxfp8_e4m3", 8),
        ("demo@mxfp4", 3),
        ("ngram", 4),
    ]
    assert loaded == []
    found = pairs("demo@mxfp4:7", "mxfp4:2", "demo:3", "ngram:9")
    assert [length for _, length in found] == [7, 2, 3, 9]
    assert found[0][0] is found[1][0]  # in that format already: its own twin
    assert found[2][0] is demo
    assert found[3][0] == PromptLookup()
    assert loaded == ["demo", "demo"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mxfp5"], r"--draft mxfp5 is no draft: give a format \(mxfp4, mxfp6_e2m3"),
        (["demo@int3"], "--draft demo@int3 is no draft"),
        (["mxfp4:"], "--draft mxfp4: is no draft"),
        ([""], "is no draft"),
        (["mxfp4:0"], "draft_len is 0, but must be a whole number of at least 1"),
        (["ngram", "mxfp4"], "--draft mxfp4 cannot draft for ngram, which has no weights; put ngram last"),
        (["ngram:3", "demo"], "--draft demo cannot draft for ngram"),
        (["none", "mxfp4"], "--draft none is plain decoding and stands alone"),
    ],
)
def test_other_specs_are_refused_before_anything_is_loaded(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        specs.parse(given)
    assert "\n" not in str(caught.value)


def test_calibration_is_of_every_twin_in_a_format(monkeypatch, demo):
    asked = []

    def quantized(model, format="mxfp4", **how):
        asked.append((format, how))
        return model

    monkeypatch.setattr(mlsd.Model, "quantized", quantized)
    given = ["mxfp4", "auto4.5", "demo@int4", "demo", "ngram"]
    specs.drafters(specs.parse(given, calibrate=True), demo, lambda name: demo, calibrate=True)
    expected = [("mxfp4", {}), ("mxfp4", {"bits": 4.5}), ("int4", {})]
    assert asked == [(format, how | {"calibrate": True}) for format, how in expected]
    assert specs.parse([], calibrate=True) == []  # what drafts by default is not known yet


@pytest.mark.parametrize("given", [["none"], ["ngram:3"], ["demo-small"]])
def test_calibration_without_a_twin_is_refused(given):
    with refused("--calibrate rounds twins", "leave"):
        specs.parse(given, calibrate=True)


@pytest.mark.slow
def test_a_folder_of_quantized_weights_drafts_for_the_level_above(tmp_path):
    plain = quantized_folders.weights()
    tensors, _ = quantized_folders.quantized("mxfp4", plain)
    folder = str(quantized_folders.write(tmp_path / "packed", tensors, quantized_folders.LAYOUTS["mxfp4"][0]))
    target = mlsd.load(quantized_folders.write_plain(tmp_path / "plain", plain), dtype="float32")

    def pairs(*given):
        return specs.drafters(specs.parse(given), target, mlsd.load)

    [(twin, length), (below, _)] = pairs(f"{folder}:6", "mxfp8_e4m3:2")
    assert (twin.card.name, length) == (folder, 6)
    assert stacks.is_twin(twin, target)
    assert below.card.name == f"{target.card.name}@mxfp8_e4m3"  # of the level above are the target's weights
    assert stacks.is_twin(below, twin)
    with refused(f"{folder} is quantized already", "leave @mxfp4 out"):
        pairs(f"{folder}@mxfp4:6")
