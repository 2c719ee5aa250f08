"""`plan`: what is measured, kept and found again; what cannot be used is as good as not there."""

import json

import jax
import numpy as np
import pytest

import mlspecqd_jax as mlsd
from mlspecqd_jax import pass_measurement, planning, plans
from mlspecqd_jax.cli import main
from mlspecqd_jax.generation import compiled, prefilled
from mlspecqd_jax.pass_times import guessed
from mlspecqd_jax.requests import request
from mlspecqd_jax.speculation.buffers import SLACK


@pytest.fixture
def twins(demo):
    return mlsd.stack(demo, demo.quantized(), lengths="auto")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlspecqd-jax" / "plans"


def some_plan(stack, slope=0.25):
    times = np.array([[1.0], [0.5]]) * (1 + slope * np.maximum(np.arange(SLACK + 1) - 1, 0))
    return plans.Plan(plans.key_of(stack.level), ("demo", "demo@mxfp4"), times, 0.001, {"greedy": 1.5})


def test_times_are_found_from_the_seconds_of_rounds():
    """Whatever is linear between the knots and never falls comes back as it was, from as few rounds as are tried."""
    rows = np.arange(SLACK + 1)
    truth = np.stack(
        [np.interp(rows, [0, 1, 2, 4, 8, 16], [0, 3, 4, 4.5, 7, 11]), np.interp(rows, [0, 1, 2, 4, 8], [0, 1, 1, 2, 3])]
    )
    passes = np.zeros((9, 2, SLACK + 1))
    for i, (n, inner) in enumerate([(0, 0), (1, 0), (3, 0), (7, 0), (15, 0), (15, 1), (15, 2), (15, 3), (15, 7)]):
        passes[i, 0, n + 1] = 2
        passes[i, 1, inner + 1] = 2 * max(n // (inner + 1), n > 0)
    found = pass_measurement._solved(passes, np.einsum("nlr,lr->n", passes, truth))
    np.testing.assert_allclose(found[:, 1:17][0], truth[0, 1:17], rtol=1e-6)
    np.testing.assert_allclose(found[1, 1:9], truth[1, 1:9], rtol=1e-6)


def test_rounds_are_forced_to_their_lengths(twins):
    asked = request(twins, [pass_measurement._repeating([5, 6, 7])], {"max_new_tokens": 40, "stop_token_ids": ()})
    state = prefilled(twins, compiled(twins, asked)[0], asked.batch)
    for caps in pass_measurement._forced(twins):
        passes, _ = pass_measurement._rounds(twins, asked, state, caps)
        assert np.flatnonzero(passes[0]).tolist() == [caps[0] + 1]
        assert passes[0].sum() == pass_measurement.ROUNDS
        assert np.flatnonzero(passes[1]).max(initial=0) == (0 if caps[0] == 0 else 1 if caps[1] == 0 else caps[1] + 1)


def test_what_is_measured_are_times(twins):
    found = pass_measurement.measure(twins, [5, 6, 7], budget=0.0)
    assert found.times.shape == (2, SLACK + 1)
    assert found.times[0, 1] == 1
    assert np.all(np.diff(found.times[:, 1:], axis=1) >= 0)
    assert np.all(found.times[:, 0] == 0)
    assert 0 < found.plain < found.seconds


def test_a_kept_plan_is_taken_and_another_is_not(demo, twins, folder, capsys):
    plan = some_plan(twins)
    path = plans.keep(plan)
    assert path.parent == folder
    assert path.stat().st_size < 4096
    assert len(list(folder.iterdir())) == 1
    again = mlsd.stack(demo, demo.quantized(), lengths="auto")
    np.testing.assert_allclose(again.control.times, plan.times, rtol=1e-4)
    assert capsys.readouterr().err == ""
    for other in ((demo.quantized("int8"),), (demo.quantized(), demo.quantized("int8")), ()):
        assert not np.allclose(mlsd.stack(demo, *other, lengths="auto").control.times[0, 2], 1.25)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (lambda text: "[]", "holds a list"),
        (lambda text: json.dumps(json.loads(text) | {"times": [[1.0, 2.0]]}), "is no plan that this version can read"),
        (
            lambda text: json.dumps(json.loads(text) | {"times": [[-1.0] * (SLACK + 1)] * 2}),
            "is no plan that this version can read",
        ),
        (lambda text: json.dumps(json.loads(text) | {"schema": 99}), "is no plan that this version can read"),
        (lambda text: json.dumps(json.loads(text) | {"key": "other"}), "is the plan of another model, machine or version"),
    ],
)
def test_what_is_no_plan_of_this_stack_is_said_and_guessed(demo, twins, folder, capsys, change, words):
    path = plans.keep(some_plan(twins))
    path.write_text(change(path.read_text()))
    stack = mlsd.stack(demo, demo.quantized(), lengths="auto")
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
    assert "times are guessed until 'mlspecqd plan' measures them anew" in line
    assert stack.control.times[0, 2] != 1.25


def test_a_plan_is_of_shapes_and_not_of_values(demo, twins):
    other = jax.tree.map(lambda leaf: leaf * 0, twins.level)
    assert plans.key_of(other) == plans.key_of(twins.level)


@pytest.mark.parametrize(("device", "more"), [("cpu", 0.06), ("cpu-xla", 0.3), ("gpu", 0), ("tpu", 0)])
def test_guesses(device, more):
    times = guessed([100, 30, 100], device)
    assert times[0, 1] == times[2, 1] == 1
    assert 0.3 < times[1, 1] < 0.4
    np.testing.assert_allclose(times[:, 16], times[:, 1] * (1 + 15 * more))
    assert np.all(times[:, 17] > times[:, 16])


@pytest.mark.slow
def test_plan_measures_keeps_and_tells(folder, capsys):
    assert main(["plan", "demo", "--draft", "mxfp4", "--prompt", "def read_file(path):"]) == 0
    out, err = capsys.readouterr()
    assert "demo@mxfp4" in out
    assert "greedy:" in out
    [path] = folder.iterdir()
    assert str(path) in err
    plan = plans.loaded(path)
    assert plan.names == ("demo", "demo@mxfp4")
    assert main(["plan", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == ["demo"]


def test_lengths_that_cannot_be_planned_are_refused(capsys):
    assert main(["plan", "demo", "--draft", "mxfp4:3"]) == 2
    assert "--draft mxfp4:3 is not what a plan is of: give drafts without lengths" in capsys.readouterr().err


def test_a_table_of_a_plan(twins):
    lines = planning.table(some_plan(twins)).splitlines()
    assert lines[0].split() == ["passes", "1", "row", "2", "rows", "4", "rows", "8", "rows", "16", "rows"]
    assert lines[1].split() == ["demo", "1.00", "1.25", "1.75", "2.75", "4.75"]
    assert lines[-1] == "greedy: 1.50 x plain decoding"
