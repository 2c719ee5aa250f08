"""The shell command: text, JSON and facts, as its options ask."""

import json
import math
import shutil

import pytest
import quantized_folders
from command import DEMO, PLAIN, SHORT, run

import cpu_kernels
import mlspecqd_jax as mlsd
from mlspecqd_jax import generation, report
from mlspecqd_jax.loading import models
from mlspecqd_jax.weights.formats import FORMATS

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def test_generate_prints_text_to_stdout_and_the_rest_to_stderr(capsys):
    code, out, err = run(capsys, "generate", *SHORT)
    assert code == 0
    code, as_json, _ = run(capsys, "generate", "demo", *SHORT, "--json")
    assert code == 0
    value = json.loads(as_json)
    assert out == value["text"][0] + "\n"
    assert "demo < ngram" in err
    assert "by default drafted with --draft ngram;" in err
    assert "12 tokens" in err
    assert "tokens drafted by ngram" in err
    assert "tokens/s" in err
    assert set(value) == {"text", "tokens", "prompt_tokens", "finish_reason", "report"}
    assert value["report"]["new_tokens"] == len(value["tokens"][0])
    _, plain, err = run(capsys, "generate", *PLAIN)
    assert plain == out
    assert "drafted" not in err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_large_model_is_drafted_by_its_twin(capsys, monkeypatch):
    """As if the demo were one: what decides is its bytes."""
    monkeypatch.setattr(mlsd.Model, "nbytes", 2 * 10**9)
    _, plain, _ = run(capsys, "generate", *PLAIN)
    _, twin, err = run(capsys, "generate", DEMO, *SHORT)
    assert twin == plain
    assert "by default drafted with --draft mxfp4:5;" in err


@pytest.mark.slow
def test_drafts_of_the_command_line(capsys):
    arguments = ["--draft", "ngram:3", "--own-cache", "--rule", "rejection", "--synthetic-acceptance", "1"]
    code, out, err = run(capsys, "generate", *SHORT, *arguments, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["report"]
    assert [(level["name"], level["draft_len"]) for level in found["levels"]] == [("demo", 3), ("ngram", 0)]
    assert [level["token_acceptance"] for level in found["levels"]] == [1, None]
    assert (found["rule"], found["synthetic_acceptance"]) == ("rejection", [1])
    _, _, err = run(capsys, "generate", *SHORT, *arguments)
    assert "the text is meaningless" in err


def test_a_draft_that_is_hardly_accepted_is_warned_of_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(report, "JUDGED", 1)
    monkeypatch.setattr(report, "COLLAPSED", 1.1)
    code, out, err = run(capsys, "generate", *SHORT, "--draft", "ngram:4")
    assert code == 0
    assert "mlspecqd: warning: demo accepts" in err
    assert "warning" not in out


@pytest.mark.slow
def test_logprobs_compare_and_none(capsys):
    code, out, _ = run(capsys, "generate", *SHORT, "--json", "--logprobs", "--compare", "--draft", "none", "--inexact")
    value = json.loads(out)
    assert code == 0
    assert len(value["logprobs"][0]) == len(value["tokens"][0])
    assert max(value["logprobs"][0]) <= 0
    assert value["report"]["speedup"] > 0
    assert value["report"]["exact"] is False


@pytest.mark.slow
def test_quantized_weights_draft_as_they_are_stored_or_are_decoded(capsys, tmp_path):
    config = quantized_folders.CONFIG | {"num_hidden_layers": 1}
    plain = quantized_folders.weights(config=config)
    tensors, _ = quantized_folders.quantized("gptq act-order", plain)
    packed = quantized_folders.write(tmp_path / "packed", tensors, quantized_folders.GPTQ, config)
    original = quantized_folders.write_plain(tmp_path / "original", plain, config)
    short = ("--prompt", "ab c", "--max-new-tokens", "12")
    code, _, err = run(capsys, "generate", original, *short, "--draft", f"{packed}:3")
    assert code == 0
    assert f"{packed}: weights of gptq (int4_g128) as the twin of {original}, whose embedding and cache they share" in err
    assert f"tokens drafted by {packed}" in err
    code, _, err = run(capsys, "generate", packed, *short, "--draft", "none", "--dequantize")
    assert code == 0
    assert f"{packed}: weights of gptq decoded to bfloat16" in err
    code, _, err = run(capsys, "generate", packed, *short)
    assert code == 2
    assert "--dequantize" in err
    assert "weights:                  quantized by gptq\n" in run(capsys, "info", packed)[1]


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    facts = dict(line.split(":", 1) for line in out.splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["family"] == "llama"
    assert facts["tokenizer"] == "yes"
    assert int(facts["bytes in bfloat16"].replace(",", "")) == 2 * int(facts["parameters"].replace(",", ""))
    assert ("C++ for bfloat16" in facts["products"]) == cpu_kernels.usable()
    assert facts["device"].startswith("cpu")


def test_info_as_json_says_the_same(capsys):
    _, out, _ = run(capsys, "info")
    code, as_json, _ = run(capsys, "info", "demo", "--json")
    assert code == 0
    found = json.loads(as_json)
    for key in ("parameters", "pass_bytes", "cache_bytes_per_token", "positions", "vocabulary"):
        assert f"{key.replace('_', ' ')}: " in out
        assert f" {found[key]:,}\n" in out
    assert found["supported"] is True
    assert f"twin in mxfp4:            {found['twins']['mxfp4']['bytes']:,} bytes more" in out
    assert set(found["twins"]) == set(FORMATS)


def test_info_of_what_is_not_supported(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    code, out, err = run(capsys, "info", tmp_path / "config.json")
    assert (code, out) == (2, "")
    assert "model_type 'mamba2' is a model with recurrent layers (a state space), which is not supported" in err
    code, out, again = run(capsys, "info", tmp_path / "config.json", "--json")
    assert (code, again) == (2, err)
    found = json.loads(out)
    assert found["supported"] is False
    assert err == f"mlspecqd: {found['why']}\n"


def test_info_shows_the_recorded_sampling_and_does_not_apply_it(capsys, tmp_path):
    shutil.copytree(DEMO, tmp_path / "m")
    recorded = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(recorded))
    _, out, _ = run(capsys, "info", tmp_path / "m")
    assert '{"do_sample": true, "temperature": 0.6, "top_p": 0.9} (not applied)' in out
    assert "end of text ids:          0, 7" in out
    _, sampled, _ = run(capsys, "generate", tmp_path / "m", *PLAIN)
    _, greedy, _ = run(capsys, "generate", "demo", *PLAIN)
    assert sampled == greedy


@pytest.mark.slow
def test_stop_ids_biases_and_the_draft_limit(capsys):
    def generated(*options):
        code, out, err = run(capsys, "generate", "demo", *SHORT, "--draft", "ngram:3", "--json", *options)
        assert code == 0, err
        return json.loads(out)

    free = generated("--stop-token-id", "1")
    tokens = free["tokens"][0]
    assert free["finish_reason"] == ["length"]
    stopped = generated("--stop-token-id", str(tokens[6]), "--stop-token-id", str(tokens[3]))
    assert stopped["tokens"][0] == tokens[: 1 + min(tokens.index(tokens[3]), tokens.index(tokens[6]))]
    assert stopped["finish_reason"] == ["stop"]
    assert generated("--logit-bias", f"{tokens[0]}=-inf", "--logit-bias", "7=2.5")["tokens"][0][0] != tokens[0]
    assert generated("--logit-bias", "9=1e6")["tokens"][0] == [9] * 12
    plain = generated("--draft-limit", "0", "--stop-token-id", "1")
    assert (plain["tokens"][0], plain["report"]["levels"][0]["drafted"]) == (tokens, 0)


def test_what_is_no_number_is_null_in_json(capsys, monkeypatch):
    nothing = generation.Generation(["x"], [[1]], [[2]], ["stop"], [[-math.inf]], {"a": [math.nan, {"b": math.inf}], "c": 1.5})
    monkeypatch.setattr(generation, "generate", lambda *_, **__: nothing)
    code, out, _ = run(capsys, "generate", *SHORT, "--draft", "none", "--json", "--logprobs")
    assert code == 0
    value = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (value["logprobs"], value["report"]) == ([[None]], {"a": [None, {"b": None}], "c": 1.5})


@pytest.mark.slow
def test_a_model_that_is_target_and_draft_is_loaded_once(capsys, monkeypatch):
    loaded, load = [], models.load
    monkeypatch.setattr(models, "load", lambda name, **settings: loaded.append(name) or load(name, **settings))
    code, _, _ = run(capsys, "generate", "demo-small", *SHORT, "--draft", "demo-small:2")
    assert code == 0
    assert loaded == ["demo-small"]
