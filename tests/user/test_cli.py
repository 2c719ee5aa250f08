"""The shell command: text, JSON, conversion, and one line with exit code 2 for whatever is wrong."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

import cpu_kernels
import mlspecqd_jax as mlsd
from mlspecqd_jax import cli, generation, prompt_files, report
from mlspecqd_jax.loading import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = ROOT / "checkpoints" / "demo"
SHORT = ["--prompt", "def fibonacci(n):\n", "--max-new-tokens", "12"]
PLAIN = [*SHORT, "--draft", "none"]


def run(capsys, *arguments):
    """Return (exit code, stdout, stderr) of the command in this process."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments):
    """Return the one line that refuses the arguments."""
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("mlspecqd: ")
    return lines[0]


def test_generate_prints_text_to_stdout_and_the_rest_to_stderr(capsys):
    code, out, err = run(capsys, "generate", *SHORT)
    assert code == 0
    code, as_json, _ = run(capsys, "generate", "demo", *SHORT, "--json")
    assert code == 0
    value = json.loads(as_json)
    assert out == value["text"][0] + "\n"
    assert "demo < ngram" in err
    assert "by default drafted with --draft ngram:4;" in err
    assert "12 tokens" in err
    assert "tokens drafted by ngram" in err
    assert "tokens/s" in err
    assert set(value) == {"text", "tokens", "prompt_tokens", "finish_reason", "report"}
    assert value["report"]["new_tokens"] == len(value["tokens"][0])
    _, plain, err = run(capsys, "generate", *PLAIN)
    assert plain == out
    assert "drafted" not in err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_large_model_is_drafted_by_its_twin(capsys, monkeypatch):
    """As if the demo were one: what decides is its bytes."""
    monkeypatch.setattr(mlsd.Model, "nbytes", 2 * 10**9)
    _, plain, _ = run(capsys, "generate", *PLAIN)
    _, twin, err = run(capsys, "generate", DEMO, *SHORT)
    assert twin == plain
    assert "by default drafted with --draft mxfp4:5;" in err


def test_drafts_of_the_command_line(capsys):
    arguments = ["--draft", "ngram:3", "--own-cache", "--rule", "rejection", "--synthetic-acceptance", "1"]
    code, out, err = run(capsys, "generate", *SHORT, *arguments, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["report"]
    assert [(level["name"], level["draft_len"]) for level in found["levels"]] == [("demo", 3), ("ngram", 0)]
    assert [level["token_acceptance"] for level in found["levels"]] == [1, None]
    assert (found["rule"], found["synthetic_acceptance"]) == ("rejection", [1])
    _, _, err = run(capsys, "generate", *SHORT, *arguments)
    assert "the text is meaningless" in err


def test_a_draft_that_is_hardly_accepted_is_warned_of_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(report, "JUDGED", 1)
    monkeypatch.setattr(report, "COLLAPSED", 1.1)
    code, out, err = run(capsys, "generate", *SHORT)
    assert code == 0
    assert "mlspecqd: warning: demo accepts" in err
    assert "warning" not in out


@pytest.mark.slow
def test_several_prompts_files_and_stdin_are_the_same_batch(capsys, tmp_path, monkeypatch):
    prompts = ["import os\n", "class A:\n"]
    options = ["--max-new-tokens", "6", "--json", "--draft", "none", "--temperature", "0.8", "--seed", "3"]

    def tokens(*arguments):
        code, out, _ = run(capsys, "generate", *options, *arguments)
        assert code == 0
        return json.loads(out)["tokens"]

    batch = tokens("--prompt", prompts[0], "--prompt", prompts[1])
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join([json.dumps(prompts[0]), "", json.dumps({"prompt": prompts[1], "id": 7})]) + "\n")
    assert tokens("--prompt-file", lines) == batch
    whole = tmp_path / "prompt.txt"
    whole.write_text(prompts[0] + "\n")
    assert tokens("--prompt-file", whole) == batch[:1]
    with whole.open(encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert tokens("--prompt-file", "-") == batch[:1]


@pytest.mark.slow
def test_logprobs_compare_and_none(capsys):
    code, out, _ = run(capsys, "generate", *SHORT, "--json", "--logprobs", "--compare", "--draft", "none", "--inexact")
    value = json.loads(out)
    assert code == 0
    assert len(value["logprobs"][0]) == len(value["tokens"][0])
    assert max(value["logprobs"][0]) <= 0
    assert value["report"]["speedup"] > 0
    assert value["report"]["exact"] is False


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    facts = dict(line.split(":", 1) for line in out.splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["family"] == "llama"
    assert facts["tokenizer"] == "yes"
    assert int(facts["bytes in bfloat16"].replace(",", "")) == 2 * int(facts["parameters"].replace(",", ""))
    assert ("C++ for bfloat16" in facts["products"]) == cpu_kernels.usable()
    assert facts["device"].startswith("cpu")


def test_info_shows_the_recorded_sampling_and_does_not_apply_it(capsys, tmp_path):
    shutil.copytree(DEMO, tmp_path / "m")
    recorded = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(recorded))
    _, out, _ = run(capsys, "info", tmp_path / "m")
    assert '{"do_sample": true, "temperature": 0.6, "top_p": 0.9} (not applied)' in out
    assert "end of text ids:      0, 7" in out
    _, sampled, _ = run(capsys, "generate", tmp_path / "m", *PLAIN)
    _, greedy, _ = run(capsys, "generate", "demo", *PLAIN)
    assert sampled == greedy


def test_convert_then_generate(capsys, tmp_path):
    code, _, err = run(capsys, "convert", "demo", tmp_path / "out", "--draft", "mxfp4")
    assert code == 0
    assert str(tmp_path / "out") in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not list((tmp_path / "out").glob("*.safetensors"))
    _, ours, _ = run(capsys, "generate", "demo", *SHORT)
    code, converted, _ = run(capsys, "generate", tmp_path / "out", *SHORT)
    assert (code, converted) == (0, ours)
    before = (tmp_path / "out" / checkpoint.MARKER).read_bytes()
    assert "exists already" in refused(capsys, "convert", "demo", tmp_path / "out")
    assert (tmp_path / "out" / checkpoint.MARKER).read_bytes() == before
    _, out, _ = run(capsys, "info", tmp_path / "out")
    assert "(converted checkpoint" in out


def test_an_unfinished_or_damaged_conversion_does_not_load(capsys, tmp_path):
    run(capsys, "convert", "demo", tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "unfinished")
    (tmp_path / "unfinished" / checkpoint.MARKER).unlink()
    assert "model.safetensors" in refused(capsys, "generate", tmp_path / "unfinished", *SHORT)
    shutil.copytree(tmp_path / "out", tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged" / checkpoint.WEIGHTS)
    assert "is damaged" in refused(capsys, "generate", tmp_path / "damaged", *SHORT)
    marker = json.loads((tmp_path / "out" / checkpoint.MARKER).read_text())
    (tmp_path / "out" / checkpoint.MARKER).write_text(json.dumps(marker | {"format": 99}))
    assert "has format 99" in refused(capsys, "generate", tmp_path / "out", *SHORT)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "no/such/folder", *SHORT], ["'no/such/folder' is not a model", "owner/name", "demo"]),
        (["generate", "dem", *SHORT], ["'dem' is not a model"]),
        (["generate", "", *SHORT], ["'' is not a model"]),
        (["generate", *SHORT, "--temprature", "1"], ["unrecognized arguments: --temprature", "--help"]),
        (["generate", *SHORT, "--temp", "1"], ["unrecognized arguments"]),
        (["generate"], ["--prompt", "--prompt-file"]),
        (["generat", *SHORT], ["invalid choice: 'generat'"]),
        (["generate", *SHORT, "--temperature", "-1"], ["temperature is -1.0", "0 (greedy) or more"]),
        (["generate", *SHORT, "--temperature", "nan"], ["temperature is nan"]),
        (["generate", *SHORT, "--top-p", "0"], ["top_p is 0.0", "more than 0"]),
        (["generate", *SHORT, "--top-k", "-3"], ["top_k is -3"]),
        (["generate", *SHORT, "--top-k", "x"], ["--top-k", "'x'"]),
        (["generate", *SHORT, "--max-new-tokens", "1e3"], ["--max-new-tokens", "'1e3'"]),
        (["generate", *SHORT, "--max-new-tokens", "9" * 30], ["exceed", "lower max_new_tokens"]),
        (["generate", *SHORT, "--temperature", "warm\nhot"], ["--temperature", "warm"]),
        (["generate", *SHORT, "--stop", ""], ["stop is", "non-empty"]),
        (["generate", *SHORT, "--stop-token-id", "-1"], ["stop_token_ids is -1", "token id"]),
        (["generate", *SHORT, "--stop-token-id", "eos"], ["--stop-token-id", "'eos'"]),
        (["generate", *SHORT, "--logit-bias", "7"], ["--logit-bias", "'7' is not ID=VALUE, such as"]),
        (["generate", *SHORT, "--logit-bias", "7=nan"], ["logit_bias is nan", "finite number"]),
        (["generate", *SHORT, "--logit-bias", "99999=1"], ["logit_bias names token 99999"]),
        (["generate", *SHORT, "--logit-bias", "7=1", "--logit-bias", "7=2"], ["--logit-bias names token 7 more than once"]),
        (["generate", *SHORT, "--draft-limit", "-1"], ["draft_limit is -1", "0 (no drafts)"]),
        (["generate", *SHORT, "--seed", "-1"], ["seed is -1"]),
        (["generate", *SHORT, "--rule", "r"], ["rule is 'r'", "coupled, rejection"]),
        (["generate", *SHORT, "--dtype", "int4"], ["dtype is 'int4'", "bfloat16"]),
        (["generate", *SHORT, "--draft", "mxfp5"], ["--draft mxfp5 is no draft", "mxfp4", "ngram"]),
        (["generate", *SHORT, "--draft", "no/such@mxfp9:3"], ["no/such@mxfp9:3 is no draft"]),
        (["generate", *SHORT, "--draft", "mxfp4:0"], ["draft_len is 0"]),
        (["generate", *SHORT, "--draft", "mxfp4:90"], ["draft_len 90 needs a window", "at most 64"]),
        (["generate", *SHORT, "--draft", "ngram", "--draft", "mxfp4"], ["--draft mxfp4 cannot draft for ngram"]),
        (["generate", *SHORT, "--draft", "mxfp4", "--draft", "none"], ["--draft none is plain decoding"]),
        (["generate", *SHORT, "--synthetic-acceptance", "0.9,x"], ["--synthetic-acceptance", "0.9,x' is no number"]),
        (["generate", *SHORT, "--synthetic-acceptance", "1.5"], ["synthetic_acceptance is 1.5"]),
        (["generate", *SHORT, "--synthetic-acceptance", "0.5,0.5,0.5"], ["3 rates", "1 levels"]),
        (["convert", "demo", "out", "--draft", "int4"], ["'int4' is not a format", "mxfp4"]),
        (["generate", *SHORT, "--logprobs"], ["--logprobs needs --json"]),
        (["generate", *SHORT, "--chat"], ["no chat template"]),
        (["generate", "--prompt", ""], ["prompt 0 is empty"]),
        (["generate", "--prompt", "x " * 2000], ["positions", "shorten the prompt"]),
        (["generate", "--prompt", "x", "--max-new-tokens", "100000"], ["exceed", "lower max_new_tokens"]),
        (["generate", "--prompt-file", "absent.txt"], ["absent.txt cannot be read", "No such file"]),
        (["convert", "demo"], ["OUT"]),
        (["convert", "demo", "no/such/place/out"], ["no/such/place is not a folder"]),
        (["info", "nothing"], ["'nothing' is not a model"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, words):
    line = refused(capsys, *arguments)
    assert all(word in line for word in words), line


def test_a_fault_of_ours_is_no_bad_input(monkeypatch):
    def fault(*_, **__):
        raise ValueError("axis 3 is out of bounds")

    monkeypatch.setattr(generation, "generate", fault)
    with pytest.raises(ValueError, match="axis 3"):
        cli.main(["generate", "demo-small", "--prompt", "x", "--json", "--draft", "none"])


def test_bad_prompt_files(capsys, tmp_path):
    for name, content, words in [
        ("a.jsonl", b'{"text": "x"}\n', 'line 1: needs a JSON string or an object with a "prompt"'),
        ("b.jsonl", b'"x"\nnot json\n', "line 2"),
        ("c.jsonl", b"\n", "holds no prompt"),
        ("d.txt", b"\xff\xfe\xff", "not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert words in refused(capsys, "generate", "--prompt-file", tmp_path / name)


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="needs a folder that nobody may write to")
def test_a_folder_that_cannot_be_written_is_refused(capsys):
    assert "/proc cannot be written" in refused(capsys, "convert", "demo", "/proc/out")


def test_an_unwritable_folder_is_refused(capsys, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", denied)
    assert "cannot be written (Permission denied)" in refused(capsys, "convert", "demo", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_during_conversion_leaves_nothing(tmp_path):
    # The child stops in the middle of the save, with weights on disk and the marker not yet written, and waits for the signal.
    child = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from mlspecqd_jax import cli; from mlspecqd_jax.loading import checkpoint\n"
        "def slow(*a, **k):\n"
        "    print('saving', flush=True)\n"
        "    time.sleep(60)\n"
        "checkpoint._mark_finished = slow\n"
        f"sys.exit(cli.main(['convert', {str(DEMO)!r}, {str(tmp_path / 'out')!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "saving\n"
    assert [p.name for p in tmp_path.iterdir()] != []  # the temporary folder is there
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "mlspecqd: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error():
    code = f"import sys; from mlspecqd_jax import cli; sys.exit(cli.main(['info', {str(DEMO)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 0, err
    assert b"Traceback" not in err


def test_prompt_files_of_any_editor(tmp_path):
    def read(name, data):
        (tmp_path / name).write_bytes(data)
        return prompt_files.read(str(tmp_path / name))

    assert read("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n") == ["one\ntwo"]
    assert read("a.txt", b"one\n\n") == ["one\n"]  # one newline is dropped, the editor's
    assert read("a.txt", "page\f\u2028\u0085\n".encode()) == ["page\f\u2028\u0085"]
    assert read("a.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n"b"\r\n') == ["a", "b"]
    assert read("a.jsonl", '{"prompt": "a\u2028b\u0085c"}\n"d\x7f\u2029"'.encode()) == ["a\u2028b\u0085c", "d\x7f\u2029"]
    assert read("a.jsonl", b'"\\u0041\\n"\n\n  \n') == ["A\n"]
    with pytest.raises(ValueError, match="line 3: needs a JSON string"):
        read("a.jsonl", b'"x"\n\n' + b"[" * 10**5 + b"\n")


def test_prompt_files_that_users_of_other_systems_met(shared):
    assert prompt_files.read(str(shared / "reports" / "bom-crlf.jsonl")) == ["Once upon a time", "The dog"]
    lines = prompt_files.read(str(shared / "reports" / "lines-u2028.jsonl"))
    assert [" ".join(line.split()) for line in lines] == ["Once upon a time there was", "The dog"]


@pytest.mark.slow
def test_stop_ids_biases_and_the_draft_limit(capsys):
    def generated(*options):
        code, out, err = run(capsys, "generate", "demo", *SHORT, "--draft", "ngram:3", "--json", *options)
        assert code == 0, err
        return json.loads(out)

    free = generated("--stop-token-id", "1")
    tokens = free["tokens"][0]
    assert free["finish_reason"] == ["length"]
    stopped = generated("--stop-token-id", str(tokens[6]), "--stop-token-id", str(tokens[3]))
    assert stopped["tokens"][0] == tokens[: 1 + min(tokens.index(tokens[3]), tokens.index(tokens[6]))]
    assert stopped["finish_reason"] == ["stop"]
    assert generated("--logit-bias", f"{tokens[0]}=-inf", "--logit-bias", "7=2.5")["tokens"][0][0] != tokens[0]
    assert generated("--logit-bias", "9=1e6")["tokens"][0] == [9] * 12
    plain = generated("--draft-limit", "0", "--stop-token-id", "1")
    assert (plain["tokens"][0], plain["report"]["levels"][0]["drafted"]) == (tokens, 0)


def test_what_is_no_number_is_null_in_json(capsys, monkeypatch):
    nothing = generation.Generation(["x"], [[1]], [[2]], ["stop"], [[-math.inf]], {"a": [math.nan, {"b": math.inf}], "c": 1.5})
    monkeypatch.setattr(generation, "generate", lambda *_, **__: nothing)
    code, out, _ = run(capsys, "generate", *SHORT, "--draft", "none", "--json", "--logprobs")
    assert code == 0
    value = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (value["logprobs"], value["report"]) == ([[None]], {"a": [None, {"b": None}], "c": 1.5})


def shell(command, **environment):
    """Run a command of a POSIX shell in which `put` stands for a script that writes to stdout, stderr and stdout again."""
    script = (
        "from mlspecqd_jax import cli, console\n"
        "def run(arguments):\n"
        "    console.put('caf\\u00e9 \\U0001f600'); console.say('said'); console.put(' end\\n')\n"
        "cli._info = run\n"
        "raise SystemExit(cli.main(['info']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SCRIPT": script, **environment}
    command = command.replace("put", f'"{sys.executable}" -c "$SCRIPT"')
    return subprocess.run(["sh", "-c", command], env=environment, capture_output=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_stdout_and_stderr_as_shells_leave_them():
    whole = "café 😀 end\n".encode()
    for command, environment, code, out, err in [
        ("put", {"PYTHONIOENCODING": "ascii"}, 0, rb"caf\xe9 \U0001f600 end" + b"\n", b"said\n"),
        ("put 2>&-", {"PYTHONIOENCODING": "utf-8"}, 0, whole, b""),
        ("put >&-", {"PYTHONIOENCODING": "utf-8"}, 0, b"", b"said\n"),
        (
            "put >/dev/full",
            {"PYTHONIOENCODING": "utf-8"},
            2,
            b"",
            b"mlspecqd: the output cannot be written (No space left on device)",
        ),
        ("put 2>/dev/full", {"PYTHONIOENCODING": "utf-8"}, 0, whole, b""),
        ("put", {"LC_ALL": "C", "LANG": "C"}, 0, None, b"said\n"),
    ]:
        done = shell(command, **environment)
        assert done.returncode == code, (command, done)
        assert out is None or done.stdout == out, (command, done)
        assert done.stderr.startswith(err), (command, done)
        assert b"Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--json"],
        pytest.param(["--prompt", "import os"], marks=pytest.mark.slow),
        pytest.param(["--compare"], marks=pytest.mark.slow),
    ],
    ids=lambda options: options[0],
)
def test_ctrl_c_ends_a_generation_of_any_form(options):
    """With slices of one round that rest a little, so that the whole would take minutes."""
    child = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from mlspecqd_jax import generation, cli\n"
        "generation.SLICE_SECONDS, whole = 0.0, generation._slice\n"
        "def rested(*arguments):\n"
        "    print('slice', file=sys.stderr, flush=True)\n"
        "    time.sleep(0.5)\n"
        "    return whole(*arguments)\n"
        "generation._slice = rested\n"
        f"options = ['--prompt', 'def f():', '--draft', 'none', '--max-new-tokens', '900', *{options!r}]\n"
        "sys.argv = ['mlspecqd', 'generate', 'demo', *options]\n"
        "cli.run()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while process.stderr.readline() not in ("slice\n", ""):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "mlspecqd: interrupted"
    assert err.count("slice") < 100
    assert "Traceback" not in err
