"""The command between shells: closed, full and narrow streams, and Ctrl-C."""

import os
import signal
import subprocess
import sys

import pytest
from command import DEMO, ROOT
from compiling import quick_flags


def test_a_closed_pipe_is_no_error():
    code = f"import sys; from mlspecqd_jax import cli; sys.exit(cli.main(['info', {str(DEMO)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 0, err
    assert b"Traceback" not in err


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
        "sys.argv = ['mlspecqd', 'generate', 'demo-small', *options]\n"
        "cli.run()\n"
    )
    environment = os.environ | quick_flags()
    command, pipe = [sys.executable, "-c", child], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)
    while process.stderr.readline() not in ("slice\n", ""):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "mlspecqd: interrupted"
    assert err.count("slice") < 100
    assert "Traceback" not in err
