"""The shell command run in this process, and the one line by which it refuses."""

import pathlib

import cpu_kernels
from mlspecqd_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEMO = ROOT / "checkpoints" / "demo"
SHORT = ["--prompt", "def fibonacci(n):\n", "--max-new-tokens", "12"]
PLAIN = [*SHORT, "--draft", "none"]


def run(capsys, *arguments):
    """Return (exit code, stdout, stderr) of the command in this process."""
    cpu_kernels.isas("matmul")  # compiled before, if need be, since that says a line
    capsys.readouterr()
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
