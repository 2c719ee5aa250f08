"""Conversations from Python and from the shell: as chats of texts are, with their ends, and one sentence for what is none."""

import io
import json
import sys
import types

import folders
import pytest
from command import refused, run

import mlspecqd_jax as mlsd
from mlspecqd_jax.requests import request

pytestmark = pytest.mark.usefixtures("compiled_quickly")

HI, HO = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Ho"}]
TURNS = [{"role": "system", "content": "s"}, *HI, {"role": "assistant", "content": "x"}, *HO]
TEMPLATE = "{% if mood is defined %}{{ mood }}{% endif %}" + folders.TEMPLATE
LENGTH = {"max_new_tokens": 5, "stop_token_ids": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.write(tmp_path_factory.mktemp("chat") / "m", TEMPLATE)


@pytest.fixture(scope="module")
def stack(folder):
    return mlsd.stack(mlsd.load(folder))


def test_messages_are_generated_and_streamed_as_chats_of_texts(stack):
    texts = mlsd.generate(stack, ["Hi", "Ho"], chat=True, **LENGTH)
    messages = mlsd.generate(stack, [HI, HO], **LENGTH)
    assert (messages.prompt_tokens, messages.tokens) == (texts.prompt_tokens, texts.tokens)
    stream = mlsd.stream(stack, HI, **LENGTH)
    assert "".join(stream) == texts.text[0]
    assert stream.generation.tokens == texts.tokens[:1]
    several = mlsd.stream(stack, TURNS, **LENGTH)  # four messages are one prompt
    assert "".join(several) == several.generation.text[0]
    (prompt,) = several.generation.prompt_tokens
    assert stack.card.tokenizer.decode(prompt).count("<|end|>") == len(TURNS)
    with pytest.raises(mlsd.InputError, match="stream continues one prompt, but 2 were given"):
        mlsd.stream(stack, [HI, HO], **LENGTH)


def test_messages_imply_the_ends_of_a_chat(stack):
    def ends(prompts, **arguments):
        return set(request(stack, prompts, arguments).sampling.stop_token_ids.ravel().tolist())

    assert ends(HI) == ends([HI, HO]) == ends(["Hi", HO]) == ends("Hi", chat=True) > ends("Hi")


def test_keywords_of_the_template(stack):
    def prompt(**arguments):
        return stack.card.tokenizer.decode(mlsd.prepare(stack, TURNS, **arguments).tokens[0])

    assert prompt(chat_template_kwargs={"mood": "kind"}).startswith("kind<s>")
    assert prompt(chat_template_kwargs=types.MappingProxyType({})) == prompt()


def test_messages_from_the_shell(capsys, folder, tmp_path, monkeypatch):
    options = ["--max-new-tokens", "5", "--json", "--draft", "none", "--stop-token-id", "1"]

    def found(*arguments):
        code, out, err = run(capsys, "generate", folder, *options, *arguments)
        assert code == 0, err
        value = json.loads(out)
        return value["prompt_tokens"], value["tokens"]

    batch = found("--prompt", "Hi", "--prompt", "Ho", "--chat")
    (tmp_path / "two.json").write_text(json.dumps([HI, HO]))
    assert found("--messages", tmp_path / "two.json") == batch
    text = json.dumps(HI).encode()
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"\xef\xbb\xbf" + text)))
    one = found("--messages", "-")
    assert one == (batch[0][:1], batch[1][:1])
    (tmp_path / "one.json").write_bytes(text)
    moody, _ = found("--messages", tmp_path / "one.json", "--chat-template-kwargs", '{"mood": "a"}')
    assert moody[0][1:] == one[0][0]
    parts = [{"type": "text", "text": "Hi"}]
    (tmp_path / "one.json").write_text(json.dumps([{"role": "user", "content": parts}]))
    code, _, err = run(capsys, "generate", folder, *options[:2], "--messages", tmp_path / "one.json", "--draft", "none")
    assert code == 0
    assert err.startswith("user: Hi\n")


def test_bad_messages_and_keywords_from_the_shell(capsys, folder, tmp_path):
    path = tmp_path / "m.json"
    for content, words in [
        (b"[{", "is no JSON"),
        (b"[" * 10**5, "is no JSON"),
        (b"\xff", "is not UTF-8"),
        (b"[]", "holds no conversation"),
        (b'{"messages": []}', "prompt 0 is {'messages': []}, but must be a list of messages"),
        (b'["Hi"]', "prompt 0, message 0 is 'Hi', but must be an object"),
        (b"[[1, 2]]", "prompt 0, message 0 is 1, but must be an object"),
        (b'[[{"role": "user", "content": "a"}], []]', "prompt 1 is [], but must be a list of messages"),
        (b'[{"role": "user"}]', "prompt 0, message 0 has no content"),
        (b'[{"role": "user", "content": "\\ud800"}]', "not valid Unicode"),
    ]:
        path.write_bytes(content)
        assert words in refused(capsys, "generate", folder, "--messages", path, "--draft", "none")
    assert "--messages absent.json cannot be read" in refused(capsys, "generate", folder, "--messages", "absent.json")
    path.write_text(json.dumps(HI))
    assert "not allowed with" in refused(capsys, "generate", folder, "--messages", path, "--prompt", "x")
    assert "demo has no chat template; give plain texts" in refused(capsys, "generate", "demo", "--messages", path)
    for given in ("x", "[1]", "3"):
        words = refused(capsys, "generate", folder, "--messages", path, "--chat-template-kwargs", given)
        assert f"{given!r} is no JSON object, such as" in words
    words = refused(capsys, "generate", folder, "--prompt", "x", "--chat-template-kwargs", "{}")
    assert "chat_template_kwargs is for a chat" in words


def test_the_template_s_own_refusal(capsys, tmp_path):
    strict = (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('Roles must\n alternate') }}{% endif %}{% endfor %}a"
    )
    folder = folders.write(tmp_path / "m", strict)
    (tmp_path / "m.json").write_text(json.dumps([HI, TURNS]))
    words = refused(capsys, "generate", folder, "--messages", tmp_path / "m.json")
    assert words.endswith("refuses prompt 1 (Roles must alternate); change the messages")
