"""Conversion from the shell: what it writes, what does not load, and that nothing is left of what fails."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command import DEMO, ROOT, SHORT, refused, run

from mlspecqd_jax.loading import checkpoint

pytestmark = pytest.mark.usefixtures("compiled_quickly")


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
