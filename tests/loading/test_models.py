"""`load`, `convert` and `describe`: names, arguments, and what a second load of a model costs."""

import collections
import gc
import json
import pathlib
import weakref

import folders
import jax
import numpy as np
import pytest
from refusals import refused

import mlspecqd_jax as mlsd
from mlspecqd_jax import specs
from mlspecqd_jax.loading import find, models
from mlspecqd_jax.loading.description import describe
from mlspecqd_jax.text import tokenizer_files
from mlspecqd_jax.text.card import Card

pytestmark = pytest.mark.usefixtures("compiled_quickly")

HERE = pathlib.Path(mlsd.__file__).parent


@pytest.fixture
def compilations():
    """Count what jax traces and compiles, by event."""
    counts = collections.Counter()

    def count(event, seconds, **details):
        counts[event] += event.startswith("/jax/core/compile")

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_duration_listener(count)


def run(folder):
    """Load and generate; return what the model was, weakly."""
    model = mlsd.load(folder, dtype="float32")
    out = mlsd.generate(mlsd.stack(model), "ab", max_new_tokens=3)
    assert len(out.tokens[0]) >= 1
    return [weakref.ref(leaf) for leaf in jax.tree.leaves(model.params)], weakref.ref(model.tokenizer)


@pytest.mark.slow
def test_loading_again_compiles_nothing_and_keeps_nothing(tmp_path, compilations, monkeypatch):
    folder = folders.write(tmp_path / "model")
    params, _ = run(folder)
    assert +compilations  # so the counter counts
    compilations.clear()
    monkeypatch.chdir(tmp_path)
    again, tokenizer = run("./model")
    assert not +compilations
    gc.collect()
    assert not any(leaf() is not None for leaf in params + again)
    assert tokenizer() is None


def test_cards_differ_by_what_belongs_to_the_network():
    card = Card("a", 9, 8, None, (1,))
    assert card == Card("b", 9, 8, object(), (1,))
    assert hash(card) == hash(Card("b", 9, 8, object(), (1,)))
    assert card != Card("a", 9, 8, None, (2,))


# Names


def test_a_folder_does_not_shadow_a_demo(tmp_path, monkeypatch):
    demo = find.find("demo")
    for name in find.DEMOS:
        folders.write_tokenizer(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert find.find("demo") == demo
    assert demo.is_absolute()
    for name in ("./demo", "demo/", tmp_path / "demo", pathlib.Path("demo")):
        assert find.find(name).resolve() == tmp_path / "demo"
        assert find.is_known(name)
    assert [spec.model for spec in specs.parse(["demo@mxfp4", "./demo@mxfp4", "demo/:3"])] == ["demo", "./demo", "demo/"]


def test_a_demo_is_not_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("./demo", "demo/", pathlib.Path("demo")):
        with refused("is not a model", "existing folder"):
            find.find(name)
        assert not find.is_known(name)


def test_a_folder_whose_name_breaks_the_line_is_none(tmp_path):
    folders.write_tokenizer(tmp_path / "a\nb")
    with refused("is not a model", "a\\nb"):
        models.load(tmp_path / "a\nb")


@pytest.mark.parametrize("name", ["", "a" * 5000, "a/" * 3000, "a\0b", "a\nb", "\ud800", "owner/" + "n" * 500, "x" * 90 + "/y"])
@pytest.mark.parametrize("call", [models.load, describe])
def test_names_that_no_disk_could_hold(monkeypatch, call, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused():
        call(name)


# Arguments


@pytest.mark.parametrize(
    "model", [None, 3, 1.5, True, b"demo", ["demo"], {"demo": 1}, object(), np.zeros((3, 3)), 10**5000], ids=type
)
@pytest.mark.parametrize("call", [models.load, describe, lambda model: models.convert(model, "never-written")])
def test_a_model_of_another_type_is_named(call, model):
    with refused("model is", "must be an existing folder, an owner/name id"):
        call(model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": None}, ("dtype is None", "bfloat16")),
        ({"dtype": ["float32"]}, ("dtype is ['float32']", "bfloat16")),
        ({"dtype": "int8"}, ("dtype is 'int8'", "bfloat16")),
        ({"dtype": np.zeros(3)}, ("dtype is an array of float64 of shape [3]", "bfloat16")),
        ({"dtype": np.float32}, ("dtype is of type type", "bfloat16")),
        ({"mesh": "x"}, ("mesh is 'x'", "Mesh")),
        ({"mesh": 2}, ("mesh is 2", "Mesh")),
    ],
)
def test_arguments_of_load_of_another_type_are_named(arguments, words):
    with refused(*words):
        models.load("demo-small", **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"folder": None}, ("folder is None", "new folder")),
        ({"folder": 7}, ("folder is 7", "new folder")),
        ({"folder": b"x"}, ("folder is b'x'", "new folder")),
        ({"folder": ""}, ("folder is ''", "new folder")),
        ({"folder": "a\0b"}, ("'a\\x00b'", "choose another name")),
        ({"folder": "a" * 5000}, ("'aaa", "choose another name")),
        ({"folder": "a" * 250}, ("'aaa", "choose another name")),  # too long only with what an unfinished one is called
        ({"folder": "a/b"}, ("a is not a folder", "create it")),
        ({"draft": 3}, ("draft is 3", "mxfp4")),
        ({"draft": ["mxfp4"]}, ("draft is ['mxfp4']", "mxfp4")),
        ({"dtype": 3}, ("dtype is 3", "bfloat16")),
    ],
)
def test_arguments_of_convert_of_another_type_are_named(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with refused(*words):
        models.convert("demo-small", **({"folder": "out"} | arguments))
    assert not list(tmp_path.iterdir())


# Odd folders


def test_what_is_no_file_is_passed_over(tmp_path):
    folder = folders.write(tmp_path / "model")
    for name in ("tokenizer_old", "special_tokens_map.json", "model.safetensors.index.json", "chat_template.jinja"):
        (folder / name).mkdir()
    model = mlsd.load(folder, dtype="float32")
    assert model.tokenizer is not None
    mlsd.convert(folder, tmp_path / "converted", dtype="float32")
    assert not (tmp_path / "converted" / "tokenizer_old").exists()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    assert mlsd.load(folder, dtype="float32").tokenizer is None


def test_a_template_of_its_own_file_comes_first(tmp_path):
    folder = folders.write_tokenizer(tmp_path, "from the config")
    assert tokenizer_files.read_tokenizer(folder).chat_template == "from the config"
    (folder / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    assert tokenizer_files.read_tokenizer(folder).chat_template == "from the file"


@pytest.mark.parametrize(
    ("template", "expected"),
    [([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"), ([], None), (None, None)],
)
def test_of_several_templates_the_default_is_taken(tmp_path, template, expected):
    assert tokenizer_files.read_tokenizer(folders.write_tokenizer(tmp_path, template)).chat_template == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chat_template": 3}, ("chat_template is 3", "must be text")),
        ({"chat_template": {"a": 1}}, ("chat_template", "must be text")),
        ({"chat_template": [{"name": "default", "template": 4}]}, ("chat_template is 4", "must be text")),
        ({"eos_token": 3}, ("eos_token is 3", "must be a token")),
        ({"additional_special_tokens": "x"}, ("additional_special_tokens is 'x'", "list")),
        ({"added_tokens_decoder": [1]}, ("added_tokens_decoder", "object")),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, ("added_tokens_decoder", "by id")),
        ({"added_tokens_decoder": {"1": 5}}, ("token 1 is 5", "must be a token")),
    ],
)
def test_a_tokenizer_config_of_other_types_is_refused(tmp_path, settings, words):
    folder = folders.write_tokenizer(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    with refused("tokenizer_config.json", *words):
        tokenizer_files.read_tokenizer(folder)
