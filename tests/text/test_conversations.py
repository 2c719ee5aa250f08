"""Conversations: turns and tools as transformers renders them, no special token twice, and what is none named by its place."""

import types

import folders
import pytest
from refusals import refused
from toy_tokenizers import TEXTS

from mlspecqd_jax.text import tokenizer_files
from mlspecqd_jax.text.conversations import holds_conversations
from mlspecqd_jax.text.detokenizer import encode

# As templates of models that call tools are written: a system by default, calls, results, and a switch.
TOOLS = """{{ bos_token }}{% if messages[0].role != 'system' %}<|system|>Be brief.<|end|>
{% endif %}{% if tools %}<|tools|>{{ tools | tojson }}<|end|>
{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|tool|>{{ m.name }}: {{ m.content }}<|end|>
{% elif m.role in ['system', 'user', 'assistant'] %}<|{{ m.role }}|>{% if m.content %}{{ m.content }}{% endif %}\
{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}<|end|>
{% else %}{{ raise_exception('Only system, user, assistant and tool are known, not ' + m.role) }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<none>{% endif %}{% endif %}"""
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None]}}}]
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": CALL},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "  And <s>now</s>? "},
]
USER = {"role": "user", "content": "Hi"}


def card(tokenizer, name="tiny"):
    return types.SimpleNamespace(name=name, tokenizer=tokenizer, vocab_size=2**17, max_positions=4000)


@pytest.fixture
def ours(tmp_path):
    return card(tokenizer_files.read_tokenizer(folders.write_tokenizer(tmp_path, TOOLS)))


def theirs(tokenizer, conversation, **given):
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True, **given)[
        "input_ids"
    ]


@pytest.mark.parametrize(
    "conversation", [TURNS, TURNS[:2], TURNS[1:], TURNS[:4], [USER], (USER, *TURNS[4:])], ids=lambda turns: len(turns)
)
def test_a_conversation_has_the_ids_that_transformers_gives_it(ours, conversation):
    assert encode(ours, conversation) == [theirs(ours.tokenizer, list(conversation))]


def test_a_template_is_given_what_it_knows_of(ours):
    plain, quick = encode(ours, TURNS), encode(ours, TURNS, chat_template_kwargs={"enable_thinking": False})
    assert plain != quick
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    for given in ({"enable_thinking": False}, {"tools": tools}, {"enable_thinking": True, "tools": tools}, {"unknown": "x"}, {}):
        assert encode(ours, TURNS, chat_template_kwargs=given) == [theirs(ours.tokenizer, TURNS, **given)]
        assert encode(ours, "Hi", chat=True, chat_template_kwargs=given) == [theirs(ours.tokenizer, [USER], **given)]


def test_a_batch_keeps_its_places_and_a_conversation_in_it_makes_chats_of_its_texts(ours):
    turns, hi = theirs(ours.tokenizer, TURNS), theirs(ours.tokenizer, [USER])
    assert encode(ours, [TURNS, [USER]]) == [turns, hi]
    assert encode(ours, ["Hi", [4, 5], TURNS, (USER,)]) == [hi, [4, 5], turns, hi]
    assert holds_conversations(["Hi", TURNS])
    assert holds_conversations(TURNS)
    assert not any(map(holds_conversations, ("Hi", ["Hi", [4, 5]], [], 7, None)))


def test_parts_of_text_are_one_text(ours):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert encode(ours, [{"role": "user", "content": parts[:1]}]) == encode(ours, "a", chat=True)
    assert encode(ours, [{"role": "user", "content": parts}]) == encode(ours, "a\nb", chat=True)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([{"role": "user"}], ["prompt 0, message 0 has no content"]),
        ([USER, {"role": "assistant", "content": None}], ["prompt 0, message 1 has no content"]),
        ([USER, {"content": "x"}], ["prompt 0, message 1 has no role", "user, assistant, system or tool"]),
        ([{"role": 3, "content": "x"}], ["prompt 0, message 0 has the role 3"]),
        ([{"role": "", "content": "x"}], ["prompt 0, message 0 has the role ''"]),
        (["Hi", [USER, "Ho"]], ["prompt 1, message 1 is 'Ho', but must be an object with a role and a content"]),
        ([[USER], [USER, {"role": "user", "content": 7}]], ["prompt 1, message 1 has the content 7", "a text"]),
        ([{"role": "user", "content": b"x"}], ["prompt 0, message 0 holds what JSON cannot say", "bytes"]),
        ([{"role": "user", "content": "x", "image": object()}], ["prompt 0, message 0 holds what JSON cannot say"]),
        ([{"role": "user", "content": [{"type": "image"}]}], ["message 0, part 0 of the content is {'type': 'image'}", '"text"']),
        ([{"role": "user", "content": ["x"]}], ["message 0, part 0 of the content is 'x'"]),
        ([[USER], [{"role": "critic", "content": "x"}]], ["template of tiny refuses prompt 1 (Only system, user", "not critic)"]),
        ([4, USER], ["prompt 0, message 0 is 4"]),
        ([{"role": "user", "content": "caf\udce9"}], ["not valid Unicode"]),
        ([{"role": "user", "content": "a" * 10**5}], ["prompt 0 has 100000 characters, more than twice the tokens"]),
    ],
)
def test_what_is_no_conversation_is_named_by_its_place(ours, prompts, words):
    with refused(*words):
        encode(ours, prompts)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("x", ["chat_template_kwargs is 'x', but must be a mapping"]),
        ({3: 4}, ["chat_template_kwargs is {3: 4}"]),
        ({"messages": []}, ["chat_template_kwargs names messages"]),
        ({"add_generation_prompt": False}, ["chat_template_kwargs names add_generation_prompt"]),
        ({"tools": [print]}, ["chat_template_kwargs holds what JSON cannot say"]),
    ],
)
def test_bad_keywords_of_a_template(ours, given, words):
    with refused(*words):
        encode(ours, TURNS, chat_template_kwargs=given)


def test_keywords_without_a_chat_and_messages_without_a_template(ours):
    with refused("chat_template_kwargs is for a chat", "chat=True"):
        encode(ours, "Hi", chat_template_kwargs={"a": 1})
    ours.tokenizer.chat_template = None
    with refused("tiny has no chat template; give plain texts"):
        encode(ours, [USER])
    with refused("tiny has no tokenizer", "token ids"):
        encode(card(None), [USER])


# No special token twice.


@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""], ids=["a BOS in the template", "none"])
def test_what_a_template_writes_is_encoded_as_it_stands(usual_tokenizer, bos):
    """With the BOS that it writes and no other, whatever the tokenizer puts before a text."""
    template = bos + "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}{{ eos_token }}"
    usual_tokenizer.chat_template = template
    ids = encode(card(usual_tokenizer), [{"role": "user", "content": text} for text in TEXTS])[0]
    assert ids == theirs(usual_tokenizer, [{"role": "user", "content": text} for text in TEXTS])
    before = usual_tokenizer.bos_token_id
    if before is not None and before != usual_tokenizer.eos_token_id:
        assert ids.count(before) == bool(bos)
        assert (ids[0] == before) == bool(bos)
    if before == usual_tokenizer.eos_token_id is not None:
        assert ids.count(before) == 1 + bool(bos)


def test_a_plain_text_has_what_the_tokenizer_puts_before_it(usual_tokenizer):
    ids = encode(card(usual_tokenizer), "he said")[0]
    assert ids == usual_tokenizer("he said")["input_ids"]
    assert ids.count(usual_tokenizer.bos_token_id) == (ids[0] == usual_tokenizer.bos_token_id)
