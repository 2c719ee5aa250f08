"""Small checkpoint folders with a tokenizer and a chat template, to be loaded as they are or damaged first."""

import json
import pathlib

import tiny
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CONFIG = tiny.FAMILIES["llama3"] | {"num_hidden_layers": 1, "eos_token_id": 2}
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ALPHABET = sorted(" \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:-_<>|/?!'")


def tokenizer() -> tokenizers.Tokenizer:
    """Return a tokenizer of single characters and five special tokens, whose ids all lie in the tiny vocabulary."""
    vocab = {token: i for i, token in enumerate(["<unk>", *ALPHABET])}
    made = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


def write(folder: pathlib.Path, template: object = TEMPLATE, shards: int = 1, **settings) -> pathlib.Path:
    """Write a tiny model with its tokenizer; `settings` go to tokenizer_config.json."""
    tiny.write_checkpoint(folder, CONFIG, tiny.weights(CONFIG), shards)
    write_tokenizer(folder, template, **settings)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "temperature": 0.6}))
    return folder


def write_tokenizer(folder: pathlib.Path, template: object = TEMPLATE, **settings) -> pathlib.Path:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
