"""The training script: the same command gives the same weights, stopped in between or not, in a form transformers reads."""

import hashlib
import importlib
import importlib.metadata
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

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_demo.py"
TINY = "--hidden 32 --ffn 32 --layers 1 --heads 2 --kv-heads 1 --vocab 300 --positions 32 --window 16 --batch 2".split()


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("train_demo")
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def data_script(script):
    """The script's data step as a module."""
    return importlib.import_module("demo_data")


@pytest.fixture(scope="module")
def source_script(script):
    """What decides which files are read, as a module."""
    return importlib.import_module("demo_sources")


@pytest.fixture(scope="module")
def training_script(script):
    """The script's training step as a module."""
    return importlib.import_module("demo_training")


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
    """A function that runs the script in this process: run(name, *more) -> exit code; folders by name, one for all data."""

    def run(name, *more):
        folders = {"source": sources, "data": tmp_path / "data", "work": tmp_path / "work" / name, "out": tmp_path / name}
        given = [word for option, folder in folders.items() for word in (f"--{option}", str(folder))]
        return script.main(["demo", *given, *TINY, "--steps", "6", *more])

    return run


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_equal_runs_and_a_stopped_one_give_equal_weights(run, tmp_path):
    assert run("first") == 0
    assert run("second") == 0
    assert run("stopped", "--stop-at", "4") == 0
    assert not (tmp_path / "stopped").exists()
    assert run("stopped", "--stop-at", "5") == 0
    assert run("stopped") == 0
    assert weights(tmp_path / "first") == weights(tmp_path / "second") == weights(tmp_path / "stopped")


@pytest.mark.slow
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


@pytest.mark.exhaustive
@pytest.mark.slow
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


def test_documents_are_without_tests_duplicates_and_undecodable_files(data_script, source_script, sources):
    (found,) = source_script.without_duplicates([source_script.folder(sources)])
    assert len(found.sources) == 60
    assert [s.name for s in found.sources][:2] == ["copy.py", "package/m01.py"]  # m00 is a copy of copy.py
    assert 0 < sum(map(data_script.held_out, found.sources)) < 30
    again = source_script.without_duplicates([found, found])
    assert [len(origin.sources) for origin in again] == [60, 0]


def test_a_table_of_numbers_is_no_document(source_script, tmp_path):
    (tmp_path / "table.py").write_text("TABLE = [" + "0.125, " * 40 + "]\n")
    (tmp_path / "code.py").write_text("def half(x):\n    return x / 2\n")
    assert [s.name for s in source_script.folder(tmp_path).sources] == ["code.py"]


def test_the_named_packages_are_installed_and_permissive(source_script):
    for name in ("optax", "pytest"):
        found = source_script.package(name)
        assert found.version
        assert found.sources
        assert "/tests/" not in "".join(s.name for s in found.sources)
    with pytest.raises(ValueError, match="hypothesis is under the licence 'MPL-2"):
        source_script.package("hypothesis")
    with pytest.raises(ValueError, match="no-such-package is not installed"):
        source_script.package("no-such-package")
    for name in source_script.PACKAGES:
        licence = source_script.licence_of(importlib.metadata.metadata(name))
        assert source_script.PERMISSIVE.search(licence), name
        assert not source_script.OTHER.search(licence), name


def test_a_large_package_gives_a_part_that_its_contents_decide(source_script, monkeypatch):
    whole = {s.name for s in source_script.package("optax").sources}
    monkeypatch.setattr(source_script, "MOST_BYTES", 100_000)
    part = source_script.package("optax").sources
    assert {s.name for s in part} < whole
    assert 50_000 < sum(len(s.text) for s in part) <= 100_000
    assert [s.name for s in part] == sorted(s.name for s in part)


def test_token_files_spell_the_sources(data_script, source_script, sources, tmp_path):
    found = source_script.folder(sources)
    data_script.prepare([found._replace(name="mine", licence="MIT")], 300, tmp_path / "data")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    data = data_script.load_data(tmp_path / "data", 300, 16)
    for split, stream in zip(("train", "validation"), data[:2], strict=True):
        text = tokenizer.decode(stream.tolist(), skip_special_tokens=False)
        members = [s.text for s in found.sources if data_script.held_out(s) == (split == "validation")]
        assert text == "".join(member + data_script.END_OF_TEXT for member in members)
        assert data.manifest["streams"][split]["files"] == len(members)
        assert data.manifest["streams"][split]["sha256"] == hashlib.sha256(stream.tobytes()).hexdigest()
    (origin,) = data.manifest["origins"]
    assert (origin["name"], origin["licence"]) == ("mine", "MIT")
    assert origin["files"]["package/m07.py"] == hashlib.sha256((sources / "package" / "m07.py").read_bytes()).hexdigest()


def test_the_batch_of_a_step_depends_on_seed_and_step_alone(training_script):
    tokens = np.arange(100, dtype=np.uint16)
    schedule = training_script.Schedule(4, 8, 9, 3, warmup=1, learning_rate=1.0, weight_decay=0.0, seed=5, compute="float32")
    batch = training_script.random_batch(tokens, schedule, 5)
    assert batch.shape == (4, 9)
    assert (np.diff(batch) == 1).all()
    assert (batch == training_script.random_batch(tokens, schedule, 5)).all()
    assert (batch != training_script.random_batch(tokens, schedule, 4)).any()
    for step in (6, 8):  # the last three are half as many windows of twice the length
        assert training_script.random_batch(tokens, schedule, step).shape == (2, 17)


@pytest.mark.exhaustive
def test_products_in_bfloat16_leave_weights_and_optimizer_in_float32(run, tmp_path):
    assert run("fine", "--compute", "float32") == 0
    assert run("coarse", "--compute", "bfloat16") == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("fine", "coarse"))
    assert weights(tmp_path / "fine") != weights(tmp_path / "coarse")
    for name, leaf in one.items():
        np.testing.assert_allclose(leaf.astype(np.float32), other[name].astype(np.float32), atol=0.02)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (["--hidden", "48"], "--hidden"),
        (["--steps", "many"], "--steps"),
        (["--kv-heads", "3"], "--heads"),
        (["--vocab", "100"], "--vocab"),
        (["--window", "32"], "--window"),
        (["--batch", "3"], "--batch"),
        (["--long-steps", "7"], "--long-steps"),
        (["--compute", "int8"], "--compute"),
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


@pytest.mark.exhaustive
def test_a_work_folder_of_another_run_is_refused(run, capsys):
    assert run("out", "--stop-at", "1") == 0
    assert run("out", "--lr", "0.5") == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_data_of_another_vocabulary_or_too_few_tokens_is_refused(run, tmp_path, capsys):
    assert run("out", "--stop-at", "1") == 0
    assert run("next", "--vocab", "320") == 2
    assert "--vocab" in capsys.readouterr().err
    assert run("next", "--window", "5000", "--positions", "10000") == 2
    assert "too few" in capsys.readouterr().err
    assert run("next", "--data", str(tmp_path)) == 2
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.slow
def test_data_is_prepared_once_and_not_from_other_files(script, run, sources, tmp_path, capsys):
    assert run("out", "--stop-at", "1") == 0
    (sources / "package" / "m00.py").write_text("another = 1\n")
    assert run("next", "--stop-at", "1") == 2
    assert "prepared from other files" in capsys.readouterr().err
    folders = ["--data", str(tmp_path / "data"), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    assert script.main(["demo-small", *folders, *TINY, "--stop-at", "1"]) == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_costs_nothing(run, sources, tmp_path, number):
    steps = ["--steps", "400", "--log-every", "1"]
    assert run("whole", *steps) == 0
    folders = ["--source", sources, "--data", tmp_path / "data", "--work", tmp_path / "w", "--out", tmp_path / "out"]
    command = [sys.executable, SCRIPT, "demo", *folders, *TINY, *steps, "--save-minutes", "0.001"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    process.send_signal(number)
    rest = process.stdout.read()
    if number == signal.SIGKILL:  # what was saved last is all that is left
        assert process.wait() == -number
    else:
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
    model = script.model_of(script.parse(["demo", *TINY, "--overwrite"]))
    params = {k: np.asarray(v, np.float32) for k, v in load_file(tmp_path / "out" / "model.safetensors").items()}
    ours, *_ = model(params, tokens, np.zeros(1, np.int32), None)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
