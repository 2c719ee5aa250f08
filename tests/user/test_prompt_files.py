"""Files of prompts, of any editor and from stdin."""

import json
import sys

import pytest
from command import refused, run

from mlspecqd_jax import prompt_files

pytestmark = pytest.mark.usefixtures("compiled_quickly")


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


def test_bad_prompt_files(capsys, tmp_path):
    for name, content, words in [
        ("a.jsonl", b'{"text": "x"}\n', 'line 1: needs a JSON string or an object with a "prompt"'),
        ("b.jsonl", b'"x"\nnot json\n', "line 2"),
        ("c.jsonl", b"\n", "holds no prompt"),
        ("d.txt", b"\xff\xfe\xff", "not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert words in refused(capsys, "generate", "--prompt-file", tmp_path / name)


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
