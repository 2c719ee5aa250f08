"""Tokenizers of GGUF files: the same ids as the tokenizer whose vocabulary they hold, and the same text back."""

import dataclasses
import itertools
import json
import random

import folders
import gguf_files
import pytest
import tiny
import tokenizers
from refusals import refused
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import models as loading
from mlspecqd_jax.loading.description import describe
from mlspecqd_jax.loading.gguf import reader
from mlspecqd_jax.loading.gguf.pre_tokenizers import RULES
from mlspecqd_jax.loading.gguf.tokenizer import end_token_ids, read_tokenizer
from mlspecqd_jax.text.detokenizer import encode

SPECIAL = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEXTS = [
    "Hello world, it's 2024! DON'T we'll\tgo   home?",
    "a  12 345678 x3.14\n\n\n  indented\r\n\ttabs ",
    "naïve café 中文字符 e\u0301tude \u2126 🙂🙂 ½ ²³ १२३",
    " leading and trailing  ",
    "",
    "x" * 40 + "'S 'll'LL ''re",
    "<|user|>Hi<|end|>\n<|assistant|>",
    "$a+b=c^d~|e `code` {json: [1, 2]} // comment_with_underscores",
]
PAT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ORIGINALS = {  # as these models' own tokenizer.json files split text
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PAT % ""), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PAT % "{1,3}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
}


def original(pre: str) -> Tokenizer:
    """Return a small tokenizer of a kind, trained on the texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = ORIGINALS[pre], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL, show_progress=False
    )
    made.train_from_iterator(itertools.repeat("\n".join(TEXTS), 3), trainer)
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    if pre == "llama-bpe":  # a token that no merges make
        state = json.loads(made.to_str())
        state["model"]["ignore_merges"] = True
        state["model"]["vocab"]["Ġnowhere"] = len(state["model"]["vocab"])
        made = Tokenizer.from_str(json.dumps(state))
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return made


def byte_level_keys(made: Tokenizer, pre: str, **more) -> dict:
    """Return the keys that llama.cpp's converter writes of a tokenizer."""
    vocab = made.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [3 if token in SPECIAL else 4 if token == "<tool>" else 1 for token in tokens]
    merges = [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    ids = {"bos_token_id": vocab["<|begin|>"], "eos_token_id": vocab["<|end|>"]}
    return gguf_files.tokenizer_keys("gpt2", tokens, types, merges=merges, pre=pre, **(ids | more))


def header(path, keys: dict):
    """Write a file of a tokenizer and an embedding; return its header."""
    count = len(keys["tokenizer.ggml.tokens"])
    tensors = {"token_embd.weight": gguf_files.floats(gguf_files.np.zeros((count, 1)))}
    return reader.read(gguf_files.write(path, {"general.architecture": "llama"} | keys, tensors))


@pytest.mark.parametrize("pre", ORIGINALS)
def test_ids_are_those_of_the_tokenizer_of_the_same_vocabulary(tmp_path, pre):
    ours = original(pre)
    found = read_tokenizer(header(tmp_path / "x.gguf", byte_level_keys(ours, pre, add_bos_token=False)))
    for text in [*TEXTS, "\n".join(TEXTS), "a<tool>b nowhere"]:
        ids = ours.encode(text).ids
        assert found(text)["input_ids"] == ids, text
        assert found.decode(ids, skip_special_tokens=False) == ours.decode(ids, skip_special_tokens=False)
        assert found.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)
        if pre != "qwen2":
            assert found.decode(ids, skip_special_tokens=False) == text
    assert found.vocab == ours.get_vocab()
    assert (found.bos_token, found.eos_token) == ("<|begin|>", "<|end|>")


def test_the_rules_differ(tmp_path):
    """Another name for the rule gives other ids, so that the test above can fail."""
    ours = original("smollm")
    split = {pre: read_tokenizer(header(tmp_path / "x.gguf", byte_level_keys(ours, pre))) for pre in ("smollm", "gpt-2", "qwen2")}
    ids = {pre: tuple(tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]) for pre, tokenizer in split.items()}
    assert len(set(ids.values())) == 3


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("default", "it's a $12345 b", ["it", "'", "s", "Ġa", "Ġ", "$", "123", "45", "Ġb"]),
        ("tekken", "HelloWorld it's 12", ["Hello", "World", "Ġit", "'s", "Ġ", "1", "2"]),
        ("deepseek-r1-qwen", "e\u0301 12", ["e", "Ìģ", "Ġ", "1", "2"]),
        ("command-r", "a 12", ["a", "Ġ", "1", "2"]),
    ],
)
def test_pieces_of_other_rules(tmp_path, pre, text, pieces):
    found = read_tokenizer(header(tmp_path / "x.gguf", byte_level_keys(original("gpt-2"), pre)))
    assert [piece for piece, _ in found.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_every_rule_can_be_compiled(tmp_path):
    for pre in RULES:
        found = read_tokenizer(header(tmp_path / "x.gguf", byte_level_keys(original("gpt-2"), pre, add_bos_token=False)))
        assert found.decode(found(TEXTS[0])["input_ids"]) == TEXTS[0]


@pytest.mark.parametrize(
    ("pre", "more", "begin", "end"),
    [
        ("llama-bpe", {}, [0], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
        ("smollm", {}, [], []),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ("smollm", {"add_eos_token": True}, [], [1]),
    ],
)
def test_what_is_put_around_a_text(tmp_path, pre, more, begin, end):
    found = read_tokenizer(header(tmp_path / "x.gguf", byte_level_keys(original("smollm"), pre, **more)))
    inner = found("Hello", add_special_tokens=False)["input_ids"]
    assert found("Hello")["input_ids"] == begin + inner + end
    assert found("Hello", "Hello")["input_ids"] == 2 * (begin + inner + end)


BYTES = [f"<0x{i:02X}>" for i in range(256)]


def sentencepiece() -> tuple[list[str], list[int], list[float]]:
    """Return tokens, types and scores of a small vocabulary in which several pairs make a token."""
    words = "▁a a b ab ▁ab abc bc ▁▁ ▁the the he th t h e c ▁ in ing ng i n g ▁thing thing".split()
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "<|turn|>", *words]
    types = [2, 3, 3, *[6] * 256, 4, *[1] * len(words)]
    drawn = random.Random(4).sample(range(len(words)), len(words))
    return tokens, types, [0.0] * 260 + [-float(score) for score in drawn]


def merged(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's BPE by its definition: join the best neighbours, the leftmost of equals, until none make a token."""
    ids = {token: i for i, token in enumerate(tokens)}
    pieces = list(text)
    while True:
        joined = [(-scores[ids[a + b]], at) for at, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids]
        if not joined:
            break
        _, at = min(joined)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [i for piece in pieces for i in ([ids[piece]] if piece in ids else [ids[f"<0x{b:02X}>"] for b in piece.encode()])]


@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece_merges_by_score(tmp_path, prefix):
    tokens, types, scores = sentencepiece()
    more = {} if prefix is None else {"add_space_prefix": prefix}
    keys = gguf_files.tokenizer_keys(
        "llama", tokens, types, scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0, **more
    )
    found = read_tokenizer(header(tmp_path / "x.gguf", keys))
    drawn = random.Random(1)
    texts = ["the thing", "a  b", "é\n🙂", "", *("".join(drawn.choices("abcthing ", k=30)) for _ in range(60))]
    for text in texts:
        escaped = ("" if prefix is False or not text else "▁") + text.replace(" ", "▁")
        ids = merged(escaped, tokens, scores)
        assert found(text)["input_ids"] == [1, *ids], text
        assert found.decode(ids) == text
    assert found("a<|turn|>b", add_special_tokens=False)["input_ids"][1] == 259
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_a_model_with_a_chat_template_and_its_conversion(tmp_path, kind):
    if kind == "byte level":
        ours = original("smollm")
        keys = byte_level_keys(ours, "smollm", eot_token_id=ours.token_to_id("<|user|>"), eom_token_id=1)
    else:
        tokens, types, scores = sentencepiece()
        tokens[259], types[259] = "<|end|>", 3
        keys = gguf_files.tokenizer_keys("llama", tokens, types, scores=scores, bos_token_id=1, eos_token_id=2, eot_token_id=259)
    template = folders.TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }} ")
    keys |= {"tokenizer.chat_template": template, "general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    config = tiny.FAMILIES["llama2"] | {"vocab_size": len(keys["tokenizer.ggml.tokens"]), "num_hidden_layers": 1}
    path = gguf_files.model(tmp_path / "x.gguf", config, keys)
    model = mlsd.load(path)
    end = model.tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.card.chat_end_token_ids[-1] == end
    assert model.card.eos_token_ids == ((1, 2) if kind == "byte level" else (2, 259))
    assert model.tokenizer.chat_template == template
    converted = mlsd.load(loading.convert(path, tmp_path / "out"))
    assert dataclasses.replace(converted.card, tokenizer=None, name="") == dataclasses.replace(model.card, tokenizer=None, name="")
    assert converted.tokenizer.chat_template == template
    assert converted.tokenizer.special_tokens_map == model.tokenizer.special_tokens_map
    for text in TEXTS:
        assert converted.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    prompts = [encode(m.card, ["the thing"], chat=True) for m in (model, converted)]
    assert prompts[0] == prompts[1]
    described = describe(path)
    assert described["tokenizer"] == ("yes (gpt2, smollm)" if kind == "byte level" else "yes (llama)")
    assert described["recorded_sampling"] == {"temperature": 0.6, "top_k": 20}
    assert describe(tmp_path / "out")["recorded_sampling"] == described["recorded_sampling"]


def test_tokens_that_only_fill_the_embedding_up_are_left_out(tmp_path):
    ours = original("smollm")
    keys = byte_level_keys(ours, "smollm")
    size = len(keys["tokenizer.ggml.tokens"])
    keys["tokenizer.ggml.tokens"] += ["[PAD421]", "[PAD421]"]
    keys["tokenizer.ggml.token_type"] += [(5, b"\5\0\0\0")] * 2
    found = read_tokenizer(header(tmp_path / "x.gguf", keys))
    assert len(found) == size
    assert found.decode([size, 1], skip_special_tokens=False) == "<|end|>"


def test_no_tokenizer(tmp_path):
    for kind in ("none", "no_vocab"):
        file = gguf_files.model(tmp_path / "x.gguf", tiny.FAMILIES["llama2"], {"tokenizer.ggml.model": kind})
        assert mlsd.load(file).tokenizer is None
        assert describe(file)["tokenizer"] == "none"
    assert end_token_ids(reader.read(gguf_files.model(tmp_path / "x.gguf", tiny.FAMILIES["llama2"], {}))) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "bert"}, ["tokenizer.ggml.model", "'bert'", "gpt2, llama"]),
        ({"model": "t5"}, ["'t5'", "not supported"]),
        ({"pre": "chameleon"}, ["'chameleon'", "tokenizer.ggml.pre", "smollm"]),
        ({"pre": None}, ["no key", "tokenizer.ggml.pre"]),
        ({"merges": None}, ["no tokenizer.ggml.merges"]),
        ({"merges": ["Ġ nowhere"]}, ["make no tokenizer"]),
        ({"merges": "Ġ t"}, ["tokenizer.ggml.merges", "list"]),
        ({"tokens": ["a", "b"]}, ["2", "embedding of"]),
        ({"tokens": None}, ["no tokenizer.ggml.tokens"]),
        ({"token_type": [1]}, ["token types"]),
        ({"bos_token_id": 10**6}, ["bos_token_id", "1000000"]),
        ({"eos_token_id": "x"}, ["eos_token_id", "'x'"]),
        ({"add_bos_token": "yes"}, ["add_bos_token", "true or false"]),
        ({"chat_template": 7}, ["chat_template", "must be text"]),
    ],
)
def test_a_tokenizer_that_is_not_read(tmp_path, change, words):
    keys = byte_level_keys(original("smollm"), "smollm")
    size = len(keys["tokenizer.ggml.tokens"])
    keys |= {f"tokenizer.{'' if name == 'chat_template' else 'ggml.'}{name}": value for name, value in change.items()}
    config = tiny.FAMILIES["llama2"] | {"vocab_size": size, "num_hidden_layers": 1}
    path = gguf_files.model(tmp_path / "x.gguf", config, {key: value for key, value in keys.items() if value is not None})
    with refused("x.gguf", *words):
        mlsd.load(path)


def test_a_token_that_stands_twice(tmp_path):
    keys = byte_level_keys(original("smollm"), "smollm")
    keys["tokenizer.ggml.tokens"][-1] = keys["tokenizer.ggml.tokens"][9]
    with refused("twice"):
        read_tokenizer(header(tmp_path / "x.gguf", keys))


def test_a_vocabulary_of_gpt2s_and_of_a_small_llamas(tmp_path, shared):
    """Real tokenizer.json files, whose vocabularies are written as keys."""
    text = "\n".join(TEXTS) + (shared / "design.md").read_text()
    ours = Tokenizer.from_file(str(shared / "tokenizers" / "gpt2" / "tokenizer.json"))
    vocab = ours.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [" ".join(pair) for pair in json.loads(ours.to_str())["model"]["merges"]]
    types = [3 if token == "<|endoftext|>" else 1 for token in tokens]
    keys = gguf_files.tokenizer_keys("gpt2", tokens, types, merges=merges, pre="gpt-2")
    assert read_tokenizer(header(tmp_path / "x.gguf", keys))(text)["input_ids"] == ours.encode(text).ids

    state = json.loads((shared / "models" / "stories260K" / "tokenizer.json").read_text())
    ours = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    first = {}
    for rank, pair in enumerate(state["model"]["merges"]):
        first.setdefault("".join(pair), rank)
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    scores = [-float(first.get(token, 1000)) for token in tokens]
    keys = gguf_files.tokenizer_keys("llama", tokens, types, scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    assert read_tokenizer(header(tmp_path / "x.gguf", keys))(text)["input_ids"] == ours.encode(text).ids
