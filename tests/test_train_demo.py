"""The training script: the same command gives the same weights, stopped in between or not, in a form transformers reads."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from safetensors.numpy import load_file

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_demo.py"
TINY = "--hidden 32 --ffn 32 --layers 1 --heads 2 --kv-heads 1 --vocab 300 --positions 32 --window 16 --batch 2".split()


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("train_demo")
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def data_script(script):
    """The script's data step as a module."""
    return importlib.import_module("demo_data")


@pytest.fixture
def sources(tmp_path):
    """A folder of small modules, some of them for validation, with one duplicate and two files that are left out."""
    root = tmp_path / "source"
    for folder in ("package", "test"):
        (root / folder).mkdir(parents=True)
    for i in range(60):
        (root / "package" / f"m{i:02}.py").write_text(f"def add_{i}(a, b):\n    return a + b * {i}\n" * 3)
    (root / "copy.py").write_text((root / "package" / "m00.py").read_text())
    (root / "test" / "left_out.py").write_text("assert True\n")
    (root / "latin.py").write_bytes(b"# \xe9\n")
    return root


@pytest.fixture
def run(script, sources, tmp_path):
    """A function that runs the script in this process: run(name, *more) -> exit code; work and out folders by name."""

    def run(name, *more):
        folders = ["--source", str(sources), "--work", str(tmp_path / "work" / name), "--out", str(tmp_path / name)]
        return script.main([*folders, *TINY, "--steps", "6", *more])

    return run


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_equal_runs_and_a_stopped_one_give_equal_weights(run, tmp_path):
    assert run("first") == 0
    assert run("second") == 0
    assert run("stopped", "--stop-at", "4") == 0
    assert not (tmp_path / "stopped").exists()
    assert run("stopped", "--stop-at", "5") == 0
    assert run("stopped") == 0
    assert weights(tmp_path / "first") == weights(tmp_path / "second") == weights(tmp_path / "stopped")
    assert run("other", "--seed", "1") == 0
    assert weights(tmp_path / "other") != weights(tmp_path / "first")


def test_exported_folder(run, tmp_path):
    assert run("out") == 0
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
        assert "lm_head.weight" not in file.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["head_dim"], config["tie_word_embeddings"], config["eos_token_id"]) == (16, True, 0)


def test_out_is_kept_unless_overwrite_is_given(script, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(SystemExit) as leave:
        run("out")
    assert leave.value.code == 2
    with pytest.raises(ValueError, match="--overwrite"):  # made while training went on
        script.export({}, None, tmp_path / "tokenizer.json", tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / "notes").read_text() == "mine"
    assert run("out", "--overwrite") == 0
    assert not (tmp_path / "out" / "notes").exists()


def test_collect_drops_tests_duplicates_and_undecodable_files(data_script, sources):
    found = data_script.collect([sources])
    assert len(found) == 60
    assert [s.name for s in found][:2] == ["copy.py", "package/m01.py"]  # m00 is a copy of copy.py
    assert 0 < sum(map(data_script.held_out, found)) < 30


def test_token_files_spell_the_sources(data_script, sources, tmp_path):
    found = data_script.collect([sources])
    data_script.prepare(found, 300, tmp_path / "data")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    for split, data in zip(("train", "validation"), data_script.load_data(tmp_path / "data", 300, 16)[:2], strict=True):
        text = tokenizer.decode(data.tolist(), skip_special_tokens=False)
        members = [s.text for s in found if data_script.held_out(s) == (split == "validation")]
        assert text == "".join(member + data_script.END_OF_TEXT for member in members)


def test_the_batch_of_a_step_depends_on_seed_and_step_alone(script):
    tokens = np.arange(100, dtype=np.uint16)
    schedule = script.Schedule(batch=3, window=8, steps=9, warmup=1, learning_rate=1.0, weight_decay=0.0, seed=5)
    batch = script.random_batch(tokens, schedule, 4)
    assert batch.shape == (3, 9)
    assert (np.diff(batch) == 1).all()
    assert (batch == script.random_batch(tokens, schedule, 4)).all()
    assert (batch != script.random_batch(tokens, schedule, 5)).any()


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (["--hidden", "48"], "--hidden"),
        (["--steps", "many"], "--steps"),
        (["--kv-heads", "3"], "--heads"),
        (["--vocab", "100"], "--vocab"),
        (["--window", "64"], "--window"),
        (["--source", "no/such/folder"], "no/such/folder"),
        (["--wdith", "3"], "--wdith"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_exit_code_2(run, capsys, bad, word):
    with pytest.raises(SystemExit) as leave:
        run("out", *bad)
    assert leave.value.code == 2
    message = capsys.readouterr().err
    assert word in message
    assert len(message.splitlines()) == 1


def test_a_work_folder_of_another_run_is_refused(run, capsys):
    assert run("out", "--stop-at", "1") == 0
    assert run("out", "--lr", "0.5") == 2
    assert "other settings" in capsys.readouterr().err


def test_data_of_another_vocabulary_or_too_few_tokens_is_refused(run, tmp_path, capsys):
    assert run("out", "--stop-at", "1") == 0
    data = str(tmp_path / "work" / "out" / "data")
    assert run("next", "--data", data, "--vocab", "320") == 2
    assert "--vocab" in capsys.readouterr().err
    assert run("next", "--data", data, "--window", "5000", "--positions", "5000") == 2
    assert "too few" in capsys.readouterr().err
    assert run("next", "--data", str(tmp_path)) == 2
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_next_run_ends_with_the_same_weights(run, sources, tmp_path, number):
    steps = ["--steps", "400", "--log-every", "1"]
    assert run("whole", *steps) == 0
    command = [sys.executable, SCRIPT, "--source", sources, "--work", tmp_path / "w", "--out", tmp_path / "out", *TINY, *steps]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == 128 + number
    assert "stopped and saved at step" in rest
    assert not (tmp_path / "out").exists()
    assert run("out", "--work", str(tmp_path / "w"), *steps) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_transformers_computes_the_same_logits(script, run, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    assert run("out") == 0
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = np.arange(20)[None] * 7 % 300
    expected = theirs(torch.tensor(tokens)).logits.detach().numpy()
    model = script.model_of(script.parse([*TINY, "--overwrite"]))
    params = {k: np.asarray(v, np.float32) for k, v in load_file(tmp_path / "out" / "model.safetensors").items()}
    ours, _ = model(params, tokens, np.zeros(1, np.int32), None)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
