"""examples/timeline.py: the passes that it makes of what was logged, against hand-made logs and against the report."""

import importlib
import pathlib
import sys

import pytest

import mlspecqd_jax as mlsd

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples"
STOP = 99


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("timeline")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def event():
    """Make an event of a depth, a start and a window; times do not matter."""
    sys.path.insert(0, str(FOLDER))
    made = importlib.import_module("recording").Event
    yield lambda depth, start, *window: made(depth, start, list(window), 0.0, 0.0)
    sys.path.remove(str(FOLDER))


def told(found):
    return [(p.depth, p.draft, p.accepted, p.appended) for p in found]


def test_passes_of_a_level_over_look_up(script, event):
    """A draft accepted in part, one in full, and none; what lies behind a draft is padding."""
    events = [
        event(1, -1, 5, 6),
        event(0, 2, 4, 5, 6, -1),
        event(1, -1, 8),
        event(0, 4, 7, 8, -1, -1),
        event(1, -1),
        event(0, 6, 9, -1, -1, -1),
    ]
    text = [1, 2, 4, 5, 7, 8, 9, 10]
    assert told(script.passes(events, text, 8)) == [
        (0, [5, 6], 1, [5, 7]),
        (0, [8], 1, [8, 9]),
        (0, [], 0, [10]),
    ]


def test_passes_of_a_draft_with_a_draft(script, event):
    """The inner level's tokens are read where its verifier judges them; its last pass is asked for what is still of use."""
    inner = [event(2, -1, 11), event(1, 1, 10, 11, -1), event(2, -1, 20), event(1, 3, 12, 20, -1)]
    target = event(0, 1, 10, 11, 12, 13, -1)  # 3 of the 4 that a draft may have, since the limit leaves no more
    found = told(script.passes([*inner, target], [0, 10, 11, 12, 14], 5))
    assert found == [(1, [11], 1, [11, 12]), (1, [20], 0, [13]), (0, [11, 12, 13], 2, [11, 12, 14])]


def test_a_cache_of_its_own_is_fed_again_and_a_stop_ends_a_draft(script, event):
    events = [event(1, 0, 0, 10), event(1, 2, 11), event(0, 1, 10, 11, STOP, -1)]
    found = told(script.passes(events, [0, 10, 11, STOP], 4))
    assert found == [(1, [], 0, [11]), (1, [], 0, [STOP]), (0, [11, STOP], 2, [11, STOP])]


def test_a_token_is_of_what_proposed_it_first(script):
    pytest.importorskip("matplotlib")
    origins = importlib.import_module("timeline_plot").origins
    passed = [
        script.Pass(1, 0, 0, [11], 1, [11, 12]),
        script.Pass(1, 0, 0, [20], 0, [13]),
        script.Pass(0, 0, 0, [11, 12, 13], 2, [11, 12, 14]),
        script.Pass(0, 0, 0, [], 0, [15]),
    ]
    assert origins(passed) == [2, 1, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "drafts", [["mxfp4:5", "ngram:3"], pytest.param(["mxfp4:4", "demo-small@mxfp4:3"], marks=pytest.mark.exhaustive)]
)
def test_a_short_run_draws_the_passes_that_the_report_counts(script, tmp_path, drafts):
    pytest.importorskip("matplotlib")
    options = ["--model", "demo-small", "--new-tokens", "12", "--runs", "1", "--plot", str(tmp_path / "plot")]
    run, plain = script.main([*options, *(word for spec in drafts for word in ("--draft", spec))])
    model = mlsd.load("demo-small")
    stack = mlsd.stack(model, *script.specs.drafters(script.specs.parse(drafts), model, mlsd.load))
    real = mlsd.generate(stack, script.PROMPT, max_new_tokens=12)
    assert run.new == plain.new == real.tokens[0]
    assert [p.appended for p in plain.passes] == [[token] for token in plain.new]
    for depth, level in enumerate(real.report["levels"]):
        passed = [p for p in run.passes if p.depth == depth]
        assert len(passed) == level["passes"]
        assert sum(len(p.draft) for p in passed) == level["drafted"]
        assert sum(p.accepted for p in passed) == level["accepted"]
    assert all(p.began < p.ended for p in run.passes)
    assert all(before.ended <= after.began for before, after in zip(run.passes, run.passes[1:], strict=False))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
