"""Chat templates: rendered as transformers renders them, never past their bounds, and what they say of the end of a turn."""

import types

import folders
import pytest
from refusals import refused

from mlspecqd_jax.loading import models
from mlspecqd_jax.text import chat, tokenizer_files
from mlspecqd_jax.text.detokenizer import encode

MESSAGE = [{"role": "user", "content": "Hi"}]


def card(tmp_path, template=folders.TEMPLATE, **settings):
    tokenizer = tokenizer_files.read_tokenizer(folders.write_tokenizer(tmp_path, template, **settings))
    return types.SimpleNamespace(name="tiny", tokenizer=tokenizer, vocab_size=97, max_positions=640)


def ids(tokens):
    return [folders.tokenizer().token_to_id(token) for token in tokens]


FEATURES = (
    "{%- set ns = namespace(n=0) -%}{% for m in messages %}\n    {% generation %}{{ m.content | trim }}{% endgeneration %}\n"
    "{% set ns.n = ns.n + 1 %}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.n }}{{ messages | tojson(indent=1) }}"
    "{{ tools is none }}{{ eos_token }}{{ add_generation_prompt }}{{ dict(a=1) }}{% if undefined_name %}x{% endif %}"
)


@pytest.mark.parametrize("template", [folders.TEMPLATE, FEATURES], ids=["plain", "features"])
@pytest.mark.parametrize("text", ["Hi", "  <|end|>\né 'quoted' <b> ", ""])
def test_a_chat_has_the_ids_that_transformers_gives_it(tmp_path, template, text):
    ours = card(tmp_path, template)
    message = [{"role": "user", "content": text}]
    theirs = ours.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert encode(ours, [text], chat=True) == [theirs["input_ids"]]


def test_texts_and_ids_of_a_batch_keep_their_places(tmp_path):
    ours = card(tmp_path)
    texts = encode(ours, ["ab", "c"], chat=True)
    assert encode(ours, ["ab", [1, 2], "c"], chat=True) == [texts[0], [1, 2], texts[1]]
    assert texts[0] == ids(["<s>", "<|user|>", "a", "b", "<|end|>", "\n", "<|assistant|>"])


ENDLESS = {
    "range": "{% for i in range(10**12) %}{% endfor %}",
    "silent loops": "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "text": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "kept text": "{% set t %}{% for i in range(99999) %}{{ 'x' * 999999 }}{% endfor %}{% endset %}",
    "a constant": "{{ ('x' * 10 ** 11) | length }}",
    "a width": "{{ '%99999999999d' % 1 }}",
    "lists of lists": "{% set n = namespace(a=[]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
}
FORBIDDEN = {
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a filter": "{{ (messages | attr('__class__')).__base__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('echo') }}",
    "a change": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/hostname' %}",
}
BROKEN = {
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "raise": ("{{ raise_exception('no system\n\x1b[2J') }}", "no system ?[2J"),
    "undefined": ("{{ nothing.at_all }}", "nothing"),
    "types": ("{{ 1 + 'a' }}", "TypeError"),
    "length": ("x" * 2**21, "longer than"),
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_takes_too_much_is_stopped(tmp_path, template):
    with refused("the chat template of tiny", "leave out --chat"):
        encode(card(tmp_path, template), "Hi", chat=True)


@pytest.mark.parametrize("template", FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_template_does_not_leave_its_sandbox(tmp_path, template):
    with refused("the chat template of tiny", "cannot be rendered"):
        encode(card(tmp_path, template), "Hi", chat=True)


@pytest.mark.parametrize(("template", "word"), BROKEN.values(), ids=BROKEN)
def test_a_broken_template_is_one_sentence(tmp_path, template, word):
    ours = card(tmp_path, template)
    with refused("the chat template of tiny", word):
        encode(ours, "Hi", chat=True)
    assert encode(ours, "Hi") == [ids("Hi")]  # it is in no other's way
    assert chat.end_token_ids(ours.tokenizer) == tuple(ids(["</s>"]))


def test_no_process_to_render_in(tmp_path, monkeypatch):
    monkeypatch.setattr(chat.sys, "executable", str(tmp_path / "gone"))
    with refused("the chat template of tiny", "cannot be started"):
        encode(card(tmp_path), "Hi", chat=True)


@pytest.mark.parametrize(
    ("template", "eos", "ends"),
    [
        (folders.TEMPLATE, "</s>", ["</s>", "<|end|>"]),
        (folders.TEMPLATE, "<|end|>", ["<|end|>"]),
        (folders.TEMPLATE, None, ["<|end|>"]),
        ("{% for m in messages %}{{ m.content }} </s>{% endfor %}", "</s>", ["</s>"]),
        ("{% for m in messages %}<|user|>{{ m.content }}\nnext{% endfor %}", "</s>", ["</s>"]),  # nothing special ends a turn
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|end|>{% endif %}{% endfor %}", "</s>", ["</s>"]),
    ],
)
def test_what_ends_a_turn(tmp_path, template, eos, ends):
    assert chat.end_token_ids(card(tmp_path, template, eos_token=eos).tokenizer) == tuple(ids(ends))


def test_a_card_says_what_ends_a_turn(tmp_path):
    model = models.load(folders.write(tmp_path / "chat"))
    assert model.card.eos_token_ids == (2,)
    assert model.card.chat_end_token_ids == tuple(ids(["</s>", "<|end|>"]))
    assert models.load(folders.write(tmp_path / "plain", None)).card.chat_end_token_ids == ()


def test_no_template(tmp_path):
    with refused("tiny has no chat template", "leave out --chat"):
        encode(card(tmp_path, None), "Hi", chat=True)
