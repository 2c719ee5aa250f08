"""The shell command on bad input: one line and exit code 2, and nothing hidden of a fault of ours."""

import pytest
from command import SHORT, refused

from mlspecqd_jax import cli, generation


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "no/such/folder", *SHORT], ["'no/such/folder' is not a model", "owner/name", "demo"]),
        (["generate", "dem", *SHORT], ["'dem' is not a model"]),
        (["generate", "", *SHORT], ["'' is not a model"]),
        (["generate", *SHORT, "--temprature", "1"], ["unrecognized arguments: --temprature", "--help"]),
        (["generate", *SHORT, "--temp", "1"], ["unrecognized arguments"]),
        (["generate"], ["--prompt", "--prompt-file"]),
        (["generat", *SHORT], ["invalid choice: 'generat'"]),
        (["generate", *SHORT, "--temperature", "-1"], ["temperature is -1.0", "0 (greedy) or more"]),
        (["generate", *SHORT, "--temperature", "nan"], ["temperature is nan"]),
        (["generate", *SHORT, "--top-p", "0"], ["top_p is 0.0", "more than 0"]),
        (["generate", *SHORT, "--top-k", "-3"], ["top_k is -3"]),
        (["generate", *SHORT, "--top-k", "x"], ["--top-k", "'x'"]),
        (["generate", *SHORT, "--max-new-tokens", "1e3"], ["--max-new-tokens", "'1e3'"]),
        (["generate", *SHORT, "--max-new-tokens", "9" * 30], ["exceed", "lower max_new_tokens"]),
        (["generate", *SHORT, "--temperature", "warm\nhot"], ["--temperature", "warm"]),
        (["generate", *SHORT, "--stop", ""], ["stop is", "non-empty"]),
        (["generate", *SHORT, "--stop-token-id", "-1"], ["stop_token_ids is -1", "token id"]),
        (["generate", *SHORT, "--stop-token-id", "eos"], ["--stop-token-id", "'eos'"]),
        (["generate", *SHORT, "--logit-bias", "7"], ["--logit-bias", "'7' is not ID=VALUE, such as"]),
        (["generate", *SHORT, "--logit-bias", "7=nan"], ["logit_bias is nan", "finite number"]),
        (["generate", *SHORT, "--logit-bias", "99999=1"], ["logit_bias names token 99999"]),
        (["generate", *SHORT, "--logit-bias", "7=1", "--logit-bias", "7=2"], ["--logit-bias names token 7 more than once"]),
        (["generate", *SHORT, "--draft-limit", "-1"], ["draft_limit is -1", "0 (no drafts)"]),
        (["generate", *SHORT, "--seed", "-1"], ["seed is -1"]),
        (["generate", *SHORT, "--rule", "r"], ["rule is 'r'", "coupled, rejection"]),
        (["generate", *SHORT, "--dtype", "int4"], ["dtype is 'int4'", "bfloat16"]),
        (["generate", *SHORT, "--draft", "mxfp5"], ["--draft mxfp5 is no draft", "mxfp4", "ngram"]),
        (["generate", *SHORT, "--draft", "no/such@mxfp9:3"], ["no/such@mxfp9:3 is no draft"]),
        (["generate", *SHORT, "--draft", "mxfp4:0"], ["draft_len is 0"]),
        (["generate", *SHORT, "--draft", "mxfp4:90"], ["draft_len 90 needs a window", "at most 64"]),
        (["generate", *SHORT, "--draft", "ngram", "--draft", "mxfp4"], ["--draft mxfp4 cannot draft for ngram"]),
        (["generate", *SHORT, "--draft", "mxfp4", "--draft", "none"], ["--draft none is plain decoding"]),
        (["generate", *SHORT, "--draft", "auto", "--draft", "mxfp4"], ["--draft auto chooses all drafts and stands alone"]),
        (["generate", *SHORT, "--synthetic-acceptance", "0.9,x"], ["--synthetic-acceptance", "0.9,x' is no number"]),
        (["generate", *SHORT, "--synthetic-acceptance", "1.5"], ["synthetic_acceptance is 1.5"]),
        (["generate", *SHORT, "--synthetic-acceptance", "0.5,0.5,0.5"], ["3 rates", "1 levels"]),
        (["convert", "demo", "out", "--draft", "int3"], ["'int3' is not a format", "mxfp4"]),
        (["convert", "demo", "out", "--calibrate"], ["calibrate is for the weights of a draft", "(--draft)"]),
        (["generate", *SHORT, "--calibrate", "--draft", "ngram"], ["--calibrate rounds twins, and ngram has none"]),
        (["generate", *SHORT, "--logprobs"], ["--logprobs needs --json"]),
        (["generate", *SHORT, "--chat"], ["no chat template"]),
        (["generate", "--prompt", ""], ["prompt 0 is empty"]),
        (["generate", "--prompt", "x " * 2000], ["positions", "shorten the prompt"]),
        (["generate", "--prompt", "x", "--max-new-tokens", "100000"], ["exceed", "lower max_new_tokens"]),
        (["generate", "--prompt-file", "absent.txt"], ["absent.txt cannot be read", "No such file"]),
        (["convert", "demo"], ["OUT"]),
        (["convert", "demo", "no/such/place/out"], ["no/such/place is not a folder"]),
        (["info", "nothing"], ["'nothing' is not a model"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, words):
    line = refused(capsys, *arguments)
    assert all(word in line for word in words), line


def test_a_fault_of_ours_is_no_bad_input(monkeypatch):
    def fault(*_, **__):
        raise ValueError("axis 3 is out of bounds")

    monkeypatch.setattr(generation, "generate", fault)
    with pytest.raises(ValueError, match="axis 3"):
        cli.main(["generate", "demo-small", "--prompt", "x", "--json", "--draft", "none"])
