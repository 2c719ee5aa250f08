"""Folders damaged in hundreds of ways, by kind and at random: each loads, or is refused in one sentence by this project."""

import json
import os
import random
import shutil

import folders
import pytest

from mlspecqd_jax.loading import checkpoint, config_file, models
from mlspecqd_jax.loading.description import describe

pytestmark = pytest.mark.filterwarnings("ignore:.*left out what this model does not use")
VALUES = [None, True, -1, 0, 1, 1.5, "x", "", [], [None], {}, {"a": 1}, float("nan"), float("inf"), 10**30, 10**400, "1" * 5000]
FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json"]
SHARD = "model-00001-of-00002.safetensors"
TEXTS = {
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "open": b"{",
    "UTF-16": b"\xff\xfe{\0}\0",
    "mark": b"\xef\xbb\xbf{}",
    "zeros": b"\0" * 999,
    "deep": b'{"a":' * 99999,
    "deep lists": b"[" * 99999,
    "long number": b'{"eos_token_id": ' + b"9" * 5000 + b"}",
    "megabytes": b'{"a": "' + b"x" * (17 * 2**20) + b'"}',
}


def said(call, folder):
    """Call; return [] if it went well, or what is wrong with the refusal, which is nothing ("") as a rule."""
    try:
        call(folder)
    except ValueError as error:
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        module = trace.tb_frame.f_globals["__name__"]
        one = "\n" not in str(error) and len(str(error)) < 1000
        return ["" if one and module.startswith("mlspecqd_jax.") else f"{module}: {error!r:.300}"]
    except BaseException as error:
        return [f"{error!r:.300}"]
    return []


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A folder in two shards."""
    return folders.write(tmp_path_factory.mktemp("intact") / "model", None, shards=2)


@pytest.fixture
def outcome(intact, tmp_path):
    """Return a function that damages a copy of the intact folder and tells whether it is still read."""

    def of(damage, what, folder=intact):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        damage(copy)
        problems = [problem for call in (models.load, describe) for problem in said(call, copy)]
        assert not any(problems), f"{what}: {problems}"
        shutil.rmtree(copy)
        return not problems

    return of


def setting(file, *path, value):
    """Return a damage that puts a value in a JSON file."""

    def damage(folder):
        top = inner = json.loads((folder / file).read_text())
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (folder / file).write_text(json.dumps(top))

    return damage


def test_the_intact_folder_is_read(outcome):
    assert outcome(lambda folder: None, "intact")


KEYS = [
    *(("config.json", key) for key in [*config_file.KEYS, "model_type", "architectures", "quantization_config", "eos_token_id"]),
    *(("config.json", "rope_scaling", key) for key in [*config_file.ROPE_KEYS, "other"]),
    ("generation_config.json", "eos_token_id"),
    ("generation_config.json", "temperature"),
    *(("tokenizer_config.json", key) for key in ["eos_token", "chat_template", "added_tokens_decoder", "extra_special_tokens"]),
    *(("tokenizer_config.json", key) for key in ["auto_map", "tokenizer_class", "model_max_length", "fast_tokenizer_files"]),
    ("model.safetensors.index.json", "weight_map"),
    ("model.safetensors.index.json", "weight_map", "model.norm.weight"),
]


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_a_key_of_another_value(outcome, path):
    read = [outcome(setting(path[0], *path[1:], value=value), f"{path}: {value!r:.30}") for value in VALUES]
    # What is never read does no harm, nor does what generation_config.json says before.
    harmless = {"auto_map", "tokenizer_class", "model_max_length", "fast_tokenizer_files", "temperature"}
    assert all(read) == (path[-1] in harmless or path == ("config.json", "eos_token_id"))


@pytest.mark.parametrize("file", [*FILES, "chat_template.jinja", "special_tokens_map.json", SHARD])
def test_a_file_of_another_kind(outcome, file):
    for what, text in TEXTS.items():
        outcome(lambda folder, text=text: (folder / file).write_bytes(text), f"{file}: {what}")

    def replaced(by):
        def damage(folder):
            (folder / file).unlink(missing_ok=True)
            by(folder / file)

        return damage

    outcome(replaced(lambda path: None), f"{file}: gone")
    outcome(replaced(lambda path: path.mkdir()), f"{file}: a folder")
    outcome(replaced(lambda path: path.symlink_to(path.name)), f"{file}: a link to itself")
    if os.path.exists("/dev/zero"):
        outcome(replaced(lambda path: path.symlink_to("/dev/zero")), f"{file}: zeros without end")
    if hasattr(os, "mkfifo"):
        outcome(replaced(os.mkfifo), f"{file}: a pipe that nobody writes to")


def test_a_file_that_may_not_be_read(outcome, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(ValueError, match="cannot be read"):
        describe("demo")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("file", [*FILES, SHARD])
def test_bytes_changed_at_random(outcome, intact, file, seed):
    rng = random.Random(seed)
    original = (intact / file).read_bytes()
    header = min(len(original), 3000)  # of a shard, the values beyond it are any number anyway

    def changed():
        data = bytearray(original)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(min(header, len(data)))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randrange(1, 20)]
                case 2:
                    data[at:at] = bytes(rng.choice(b'0123456789{}[]",:-e.') for _ in range(rng.randrange(1, 6)))
        return data

    cuts = [original[:n] for n in (1, 7, 8, 9, 100, len(original) // 2, len(original) - 1)]
    for i, data in enumerate([*(changed() for _ in range(10)), *cuts]):
        outcome(lambda folder, data=data: (folder / file).write_bytes(data), f"{file}, seed {seed}, damage {i}")


def test_a_converted_folder(outcome, tmp_path):
    models.convert(folders.write(tmp_path / "source", None), tmp_path / "converted", dtype="float32")
    weight = f"{checkpoint.WEIGHTS}/model.norm.weight"
    for file, keys in {
        checkpoint.MARKER: ["format", "drafts", "dtypes"],
        f"{weight}/.zarray": ["dtype", "shape", "chunks"],
    }.items():
        for key in keys:
            for value in [None, 1, "1" * 5000, 10**400, "|O", "<i8", ["x"], [["a", "|O"]], {"a": 1}]:
                outcome(setting(file, key, value=value), f"{file}: {key} {value!r:.30}", tmp_path / "converted")
        for what in ("nothing", "list", "deep", "UTF-16"):
            outcome(lambda folder, file=file, text=TEXTS[what]: (folder / file).write_bytes(text), what, tmp_path / "converted")
    assert outcome(lambda folder: None, "intact", tmp_path / "converted")
    assert not outcome(lambda folder: shutil.rmtree(folder / weight), "gone", tmp_path / "converted")


def test_sizes_beyond_any_memory_are_refused_by_the_headers(outcome):
    for key, value in {
        "vocab_size": 2**24,
        "hidden_size": 6 * 2**17,
        "intermediate_size": 2**22,
        "num_hidden_layers": 1024,
    }.items():
        assert not outcome(setting("config.json", key, value=value), key)
