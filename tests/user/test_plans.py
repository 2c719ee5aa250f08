"""`plan`: what is measured, kept and found again; what cannot be used is as good as not there."""

import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

import mlspecqd_jax as mlsd
from mlspecqd_jax import planner, planning, plans, report
from mlspecqd_jax.cli import main
from mlspecqd_jax.pass_times import ROWS, guessed
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.counts import Counts
from mlspecqd_jax.speculation.guide import CLASSES, LOOKUP, MODEL


@pytest.fixture
def twins(demo):
    return mlsd.stack(demo, demo.quantized(), lengths="auto")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlspecqd-jax" / "plans"


SEEN = np.zeros((2, 2, CLASSES, 2), int)


def some_plan(stack, slope=0.25):
    times = np.array([[1.0], [0.5]]) * (1 + slope * np.maximum(np.arange(SLACK + 1) - 1, 0))
    return plans.Plan(plans.key_of(stack.level), ("demo", "demo@mxfp4"), times, 0.05, 0.001, SEEN, {"greedy": 1.5})


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
        (lambda text: json.dumps({"schema": plans.SCHEMA}), "is no plan that this version can read"),
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


def test_what_was_seen_is_expected_from_then_on(demo, twins):
    """What was accepted by class, and how fast that was, are where a run begins."""
    seen = SEEN.copy()
    seen[0, MODEL, 2] = 90, 100
    seen[0, LOOKUP, 0] = 0, 2
    usual = mlsd.stack(demo, demo.quantized(), lengths=some_plan(twins)._replace(speedups={})).control
    control = mlsd.stack(demo, demo.quantized(), lengths=some_plan(twins)._replace(seen=seen)).control
    added = np.asarray(control.prior - usual.prior)
    np.testing.assert_allclose(added[0, MODEL, 2], [3.6, 4.0], rtol=1e-6)
    np.testing.assert_allclose(added[0, LOOKUP, 0], [0.0, 2.0], atol=1e-6)
    assert np.count_nonzero(added) == 3
    assert (usual.rate, control.rate) == (np.float32(1.3), np.float32(1.5))


def test_what_was_seen_is_in_the_report():
    rng = np.random.default_rng(0)
    by_class = rng.integers(100, size=(3, 2, 4, CLASSES, 2))  # of three levels and four rows
    levels = [report.passes_of(Counts.zeros(4, 0)._replace(by_class=each)) for each in by_class]
    assert np.array_equal(report.seen_by_class({"levels": levels}, 2), by_class[:2].sum(axis=2))


def test_a_plan_is_of_shapes_and_not_of_values(demo, twins):
    other = jax.tree.map(lambda leaf: leaf * 0, twins.level)
    assert plans.key_of(other) == plans.key_of(twins.level)


def test_a_mixture_s_wide_windows_read_more():
    """Four times the bytes of one row, in a window of 16; a twin of a third of the bytes takes a third of that more."""
    read = np.interp(ROWS, [1, 16], [100, 400])
    wide = guessed([read, read / 3], "gpu")[:, 16] - guessed([100, 100 / 3], "gpu")[:, 16]
    np.testing.assert_allclose(wide, 0.94 * np.array([3, 1]))


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
    assert np.all(plan.seen[..., 0] <= plan.seen[..., 1])
    assert main(["plan", "demo", "--draft", "ngram", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == ["demo"]


@pytest.mark.exhaustive
def test_plan_chooses(folder, capsys):
    """Every twin is tried, whatever comes of it, and the next run says what drafts."""
    assert main(["plan", "demo", "--prompt", "def read_file(path):"]) == 0
    out, _ = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["none", "ngram"]
    assert {line.split()[0] for line in out.splitlines()[3:7]} == set(planner.twins_for("cpu"))
    chosen = planner.default_drafts(mlsd.load("demo"))
    assert main(["generate", "--prompt", "def f(", "--max-new-tokens", "4"]) == 0
    said = f"--draft {' --draft '.join(chosen)}" if chosen else "decoded plainly, as its plan says"
    assert said in capsys.readouterr().err


def test_lengths_that_cannot_be_planned_are_refused(capsys):
    assert main(["plan", "demo", "--draft", "mxfp4:3"]) == 2
    assert "--draft mxfp4:3 is not what a plan is of: give drafts without lengths" in capsys.readouterr().err


def test_a_table_of_a_plan(twins):
    lines = planning.table(some_plan(twins)).splitlines()
    assert lines[0].split() == ["passes", "1", "row", "2", "rows", "4", "rows", "8", "rows", "16", "rows"]
    assert lines[1].split() == ["demo", "1.00", "1.25", "1.75", "2.75", "4.75"]
    assert lines[-1] == "greedy: 1.50 x plain decoding"


def test_a_plan_of_ones_own_is_taken_whatever_is_kept(demo, twins, folder, tmp_path):
    plans.keep(some_plan(twins))
    some_plan(twins, slope=0.5).save(tmp_path / "mine.json")
    pinned = mlsd.stack(demo, demo.quantized(), lengths=mlsd.Plan.load(tmp_path / "mine.json"))
    assert pinned.control.times[0, 2] == 1.5
    assert pinned.control.plain == np.float32(0.001)
    with pytest.raises(mlsd.InputError, match="the plan is of 2 levels, demo, demo@mxfp4, but the stack has 1"):
        mlsd.stack(demo, lengths=mlsd.Plan.load(tmp_path / "mine.json"))
    with pytest.raises(mlsd.InputError, match="the plan of demo, demo@mxfp4 chose no drafts; name those that it is of"):
        mlsd.stack(demo, "auto", lengths=mlsd.Plan.load(tmp_path / "mine.json"))


@pytest.mark.parametrize("drafts", [("mxfp4",), ()])
def test_a_plan_of_ones_own_says_what_drafts_too(demo, twins, folder, drafts):
    tried = (plans.Tried((), {}, speeds_of(1.0, 1.0)), plans.Tried(("mxfp4",), {}, speeds_of(1.2, 1.1)))
    pinned = mlsd.stack(demo, "auto", lengths=some_plan(twins, slope=0.5)._replace(drafts=drafts, tried=tried))
    assert len(pinned.levels) == 1 + len(drafts)
    assert pinned.control.times[0, 2] == 1.5 if drafts else pinned.control is None


def test_a_batch_is_not_held_against_times_of_one_row(twins):
    """Whose passes are guessed from windows of as many rows."""

    class State(NamedTuple):
        control: mlsd.Autopilot
        plan: object
        length: list

    control = mlsd.Autopilot.create(some_plan(twins).times, np.ones((2, 2, 8, 2)), 2, plain=0.001)
    counted = control.init((15, 7), 1)._replace(time=100.0, done=np.array([120]), least=1.0)
    assert report.autopilot_of(State(control, counted, [5]), 0.2)["drift"] == pytest.approx(1.0)
    assert report.autopilot_of(State(control, counted, [5, 5]), 0.2)["drift"] is None


def passes_of(plan, target, twin):
    passes = np.zeros(plan.times.shape, int)
    passes[0, 5], passes[1, 1] = target, twin
    return passes


def test_runs_refine_what_is_kept(twins):
    plan = some_plan(twins)
    passes = passes_of(plan, 100, 400)
    seconds = plans.seconds_of(plan, passes).sum()
    again = plans.refined(plan, passes, seconds)
    np.testing.assert_allclose(again.times, plan.times)
    for factor in (0.5, 1.4, 100.0):
        later = plan
        errors = []
        for _ in range(60):
            later = plans.refined(later, passes, factor * seconds)
            errors.append(abs(plans.seconds_of(later, passes).sum() / (factor * seconds) - 1))
        assert later.times[0, 1] == 1
        assert np.all(np.diff(errors) <= 1e-9)
        assert errors[-1] < 0.02 or factor == 100.0  # whatever a run says, it moves times by a quarter at most
    np.testing.assert_allclose(plans.seconds_of(plans.refined(plan, passes, 1e9), passes).sum(), 1.25 * seconds)


def test_only_what_says_something_new_is_learnt(twins, folder):
    plan = some_plan(twins)
    path = plans.keep(plan)
    before = path.read_bytes()

    def learn(target, error, rows=1):
        passes = passes_of(plan, target, 4 * target)
        counts = tuple(Counts.zeros(rows, 15)._replace(by_rows=each) for each in passes)
        plans.learn(twins.level, counts, (1 + error) * plans.seconds_of(plan, passes).sum())

    learn(plans.ENOUGH - 1, 1.0)  # too few
    learn(plans.ENOUGH, 0.9 * plans.SETTLED)  # nothing new
    learn(plans.ENOUGH, 1.0, rows=2)  # of a batch, whose passes are others
    assert path.read_bytes() == before
    learn(plans.ENOUGH, 1.0)
    assert plans.loaded(path).plain > plan.plain
    path.write_text("{")
    learn(plans.ENOUGH, 1.0)
    assert path.read_text() == "{"


def speeds_of(greedy, drawn):
    return {"greedy": greedy, "T = 0.8": drawn}


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ({"ngram": (1.4, 0.9), "mxfp4": (1.3, 1.2), "int8": (1.1, 1.1)}, ("mxfp4",)),
        ({"ngram": (1.4, 1.2), "mxfp4": (1.3, 1.2), "int8": (1.1, 1.1)}, ("ngram",)),
        ({"ngram": (1.1, 0.8), "mxfp4": (0.9, 1.0), "int8": (0.9, 0.9)}, ()),
        ({"ngram": (1.2, 1.2), "mxfp4": (1.25, 1.25), "int8": (0.9, 0.9)}, ("ngram",)),  # no more than noise may make
        ({"ngram": (1.01, 1.01), "mxfp4": (1.04, 1.04), "int8": (0.9, 0.9)}, ()),
    ],
)
def test_the_fastest_is_chosen_and_drafts_from_then_on(demo, folder, monkeypatch, measured, chosen):
    """What is measured is given; of the twins that promise about the most, two are."""
    promised = {
        "mxfp4": speeds_of(1.5, 1.5),
        "auto4.5": speeds_of(1.0, 1.0),
        "int8": speeds_of(1.4, 1.4),
        "nvfp4": speeds_of(1.39, 1.39),
    }
    tried = []

    def measure(asked, drafters):
        [drafter] = drafters
        name = "ngram" if drafter == mlsd.prompt_lookup() else drafter.recipe.format
        tried.append(name)
        stack = mlsd.stack(asked.target, drafter, lengths="auto")
        times = np.ones((len(stack.levels), SLACK + 1))
        names = tuple(card.name for card in stack.cards)
        plan = plans.Plan(plans.key_of(stack.level), names, times, 0.05, 0.001, SEEN[: len(names)], speeds_of(*measured[name]))
        plans.keep(plan)
        return planning._Found(stack, plan)

    monkeypatch.setattr(planning, "_measured", measure)
    monkeypatch.setattr(planning, "_predicted", lambda asked, lookup: promised)
    assert planner.default_drafts(demo) == ("ngram",)
    stack, plan = mlsd.plan(demo)
    assert tried == ["ngram", "mxfp4", "int8"]
    assert plan.drafts == planner.default_drafts(demo) == chosen
    assert [each.drafts for each in plan.tried] == [(), ("ngram",), ("mxfp4",), ("int8",), ("nvfp4",), ("auto4.5",)]
    assert [line.split()[0] for line in planning.table(plan).splitlines() if "chosen" in line] == [" ".join(chosen) or "none"]
    for each in (stack, mlsd.stack(demo, "auto")):
        assert (each.control is None) == (not chosen)
        assert [card.name for card in each.cards] == ["demo"] + ["demo@mxfp4"] * (chosen == ("mxfp4",))
    if chosen:
        assert mlsd.stack(demo, "auto").control.times[0, 16] == 1


def test_times_that_are_no_longer_true_are_warned_of():
    level = {"name": "m", "rounds": report.JUDGED, "judged": 0, "token_acceptance": None}
    found = {"levels": [level], "synthetic_acceptance": None, "autopilot": {"drift": 0.3}}
    [sentence] = report.warnings_of(found)
    assert sentence.startswith("rounds took more than 1.25 times what the plan's times say")
    [sentence] = report.warnings_of(found | {"autopilot": {"drift": -0.3}})
    assert sentence.startswith("rounds took less than 0.75 times")
    for drift in (None, 0.2, -0.2):
        assert report.warnings_of(found | {"autopilot": {"drift": drift}}) == []
    assert report.warnings_of(found | {"levels": [level | {"rounds": report.JUDGED - 1}]}) == []


@pytest.mark.slow
def test_a_run_is_compared_with_its_plan_and_refines_it(demo, twins, folder):
    plan = some_plan(twins)._replace(plain=1e-6)
    path = plans.keep(plan)
    stack = mlsd.stack(demo, demo.quantized(), lengths="auto")
    with pytest.warns(UserWarning, match="rounds took more than"):
        out = mlsd.generate(stack, "def f(", max_new_tokens=70, draft_limit=0, stop_token_ids=())
    assert out.report["autopilot"]["drift"] > 1
    assert 0 < out.report["prefill_seconds"] < out.report["seconds"]
    assert plans.loaded(path).plain > plan.plain
