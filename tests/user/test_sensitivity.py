"""`mlspecqd sensitivity`: the table and the picture of what each weight costs, and how it refuses."""

import json

import pytest
from command import refused, run

import mlspecqd_jax as mlsd
from mlspecqd_jax import sensitivity_table

pytestmark = pytest.mark.usefixtures("compiled_quickly")

COSTS = {
    f"model.layers.{i}.{part}.weight": {"mxfp4": 0.002 * (i + 1), "int8": 0.00001}
    for i in range(3)
    for part in ("self_attn.q_proj", "mlp.down_proj")
} | {"lm_head.weight": {"mxfp4": 0.02, "int8": 0.0}}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(mlsd.Model, "sensitivity", lambda self: COSTS)


def test_the_table_adds_up_kinds_of_weight():
    lines = [line.split() for line in sensitivity_table.table(COSTS).splitlines()]
    assert lines[:5] == [
        ["mxfp4", "int8"],
        ["q_proj", "12.00", "0.03"],
        ["down_proj", "12.00", "0.03"],
        ["lm_head", "20.00", "0.00"],
        ["all", "44.00", "0.06"],
    ]


def test_the_command_prints_it_or_json(capsys, measured):
    code, out, _ = run(capsys, "sensitivity", "demo-small")
    assert (code, out) == (0, sensitivity_table.table(COSTS))
    code, out, _ = run(capsys, "sensitivity", "demo-small", "--json")
    assert (code, json.loads(out)) == (0, COSTS)


@pytest.mark.slow
def test_the_picture_is_drawn(capsys, measured, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = run(capsys, "sensitivity", "demo-small", "--plot", tmp_path / "found.svg")
    assert code == 0
    assert "wrote" in err
    drawn = (tmp_path / "found.svg").read_text()
    assert drawn.startswith("<?xml")
    assert drawn.count('id="axes_') == 3  # two formats and the colours


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/folder"], ["'no/such/folder' is not a model"]),
        (["demo-small", "--plot", "found.txt"], ["--plot found.txt ends in none of .png, .svg, .pdf"]),
        (["demo-small", "--plot", "no/such/found.png"], ["is in no folder that is there"]),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    line = refused(capsys, "sensitivity", *arguments)
    assert all(word in line for word in words)
