"""examples/acceptance.py: what it refuses, what it counts, and the plot."""

import gzip
import importlib
import json
import pathlib
import sys

import pytest

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("acceptance")
    sys.path.remove(str(FOLDER))


def level(name, draft_len, **counts):
    return {"name": name, "draft_len": draft_len} | counts


@pytest.fixture
def report():
    """Two levels that judge, as a generation reports them: look-up drafts in every round, and the twin accepts all of it."""
    return {
        "levels": [
            level(
                "demo",
                6,
                rounds=10,
                drafted=60,
                judged=50,
                token_acceptance=0.5,
                acceptance_by_position=[0.5] * 6,
                judged_by_position=[10] * 6,
                passes=10,
            ),
            level(
                "twin",
                3,
                rounds=20,
                drafted=60,
                judged=60,
                token_acceptance=1.0,
                acceptance_by_position=[1.0] * 3,
                judged_by_position=[20] * 3,
                passes=20,
            ),
            level("ngram", 0, rounds=0, judged=0, passes=0),
        ],
        "requests": [{"new_tokens": 10}, {"new_tokens": 1}],
    }


def test_tokens_a_round_are_predicted_for_the_tokens_that_there_are(script, report):
    outer, inner = (script.of_level(report, i) for i in (0, 1))
    assert (outer["verifier"], outer["draft"]) == ("demo", "twin")
    assert outer["tokens_per_round"] == 1.1
    assert outer["predicted_tokens_per_round"] == pytest.approx(11 / (1 + script.rounds_for(10, [0.5] * 6)))
    assert (inner["verifier"], inner["draft"]) == ("twin", "ngram")
    assert inner["tokens_per_round"] == inner["predicted_tokens_per_round"] == 3  # a draft of 6 takes two rounds: 4 and 2


def test_look_up_is_predicted_by_how_often_it_found_a_draft(script, report):
    inner = report["levels"][1]
    inner |= {"judged_by_position": [8, 8, 4], "acceptance_by_position": [1.0, 0.5, None]}
    row = script.of_level(report, 1)
    match = script.match_rate(8 / 20, [1.0, 0.5, 0.0], 6)
    assert 8 / 20 < match < 1
    assert row["predicted_tokens_per_round"] == pytest.approx(6 / script.rounds_for(6, [1.0, 0.5, 0.0], match))
    report["levels"][2]["passes"] = 20  # a model, which drafts whenever it is asked
    assert script.of_level(report, 1)["predicted_tokens_per_round"] == 6 / script.rounds_for(6, [1.0, 0.5, 0.0])


def test_the_table_has_a_line_for_each_row(script, report):
    row = {"stack": "mxfp4, ngram", "temperature": 0.6, "judge": 0} | script.of_level(report, 0)
    head, line = script.table([row]).splitlines()
    assert head.split()[:2] == ["stack", "T"]
    assert (
        line.split()
        == ["mxfp4,", "ngram", "0.6", "demo", "0.500", "1.10", f"{row['predicted_tokens_per_round']:.2f}"] + ["0.50"] * 6
    )


def test_a_small_model_brings_its_stacks(script):
    assert "small@mxfp4" not in script.stacks_of(None)
    with_small = script.stacks_of("some/model")
    assert with_small["small"] == ["some/model:6"]
    assert with_small["mxfp4, small@mxfp4"] == ["mxfp4:6", "some/model@mxfp4:3"]


def test_prompts_are_read_gzipped_or_not(script, tmp_path):
    lines = "".join(json.dumps({"prompt": text, "task_id": 3}) + "\n" for text in ("def f():", "class A:"))
    (tmp_path / "p.jsonl").write_text(lines)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert script.read_prompts(tmp_path / "p.jsonl", None) == ["def f():", "class A:"]
    assert script.read_prompts(tmp_path / "p.jsonl.gz", 1) == ["def f():"]


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (["--model", "nope"], "'nope' is not a model"),
        (["--prompts", "no/such.jsonl"], "no/such.jsonl"),
        (["--prompts", str(FOLDER / "acceptance.py")], "one JSON object"),
        (["--number", "0"], "--number"),
        (["--new-tokens", "0"], "--new-tokens"),
        (["--new-tokens", "4000"], "positions"),
        (["--temperatures", "0", "-1"], "--temperatures"),
        (["--json", "no/such/folder/rows.json"], "no/such/folder"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_exit_code_2(script, capsys, bad, word):
    try:
        code = script.main(["--no-plot", *bad])
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2
    message = capsys.readouterr().err
    assert word in message
    assert len(message.splitlines()) == 1


def test_without_matplotlib_the_plot_is_refused_before_any_work(script, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as leaving:
        script.main([])
    assert leaving.value.code == 2
    assert "pip install '.[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("small", [None, "demo-small"])
def test_every_stack_is_one_that_the_command_line_takes(script, small):
    assert all(script.specs.parse(written) for written in script.stacks_of(small).values())


@pytest.mark.slow
def test_a_short_run_counts_and_draws(script, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    label = "mxfp4, small@mxfp4"
    monkeypatch.setattr(script, "stacks_of", lambda small, real=script.stacks_of: {label: real(small)[label]})
    files = ["--plot", str(tmp_path / "plot"), "--json", str(tmp_path / "rows.json")]
    assert script.main([*files, "--number", "2", "--new-tokens", "12", "--temperatures", "0", "0.6"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["temperature"] for row in rows} == {0, 0.6}
    assert {(row["stack"], row["judge"]) for row in rows} == {(label, 0), (label, 1)}
    assert capsys.readouterr().out.count("\n") == len(rows) + 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
