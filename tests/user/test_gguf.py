"""GGUF files from the shell: generate, info, convert, and as a draft; one line says what was dequantized."""

import json

import gguf_files
import numpy as np
import pytest
import tiny
from command import refused, run

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import checkpoint

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = tiny.FAMILIES["llama2"] | {"vocab_size": 259, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1}
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]


@pytest.fixture
def path(tmp_path):
    keys = gguf_files.tokenizer_keys("llama", TOKENS, [2, 3, 3, *[6] * 256], bos_token_id=1, eos_token_id=2, add_space_prefix=False)
    tensors = gguf_files.tensors_of(CONFIG, tiny.weights(CONFIG))
    raw = np.random.default_rng(0).integers(0, 256, (259, 3, 18), np.uint8)
    raw[..., 1] = 0x2C
    tensors["token_embd.weight"] = ("Q4_0", raw.reshape(-1), (259, 96))
    return gguf_files.write(tmp_path / "x.gguf", gguf_files.keys_of(CONFIG) | keys, tensors)


def test_from_the_shell(capsys, tmp_path, path):
    code, out, _ = run(capsys, "info", path)
    assert code == 0
    assert f"(GGUF file {path})" in out
    assert "tensors:                  11 F32, 1 Q4_0\n" in out
    code, _, err = run(capsys, "convert", path, tmp_path / "out")
    assert code == 0
    assert checkpoint.is_converted(tmp_path / "out")
    (told,) = [line for line in err.splitlines() if "dequantized" in line]
    assert "(1 of Q4_0 and 11 of floats); the rounding to bfloat16 is ours" in told


@pytest.mark.slow
def test_generated_as_by_its_conversion_with_the_file_as_a_draft(capsys, tmp_path, path):
    arguments = ["--prompt", "ab", "--max-new-tokens", "5", "--json"]
    code, plain, _ = run(capsys, "generate", path, *arguments, "--draft", "none")
    assert code == 0
    run(capsys, "convert", path, tmp_path / "out")
    code, converted, _ = run(capsys, "generate", tmp_path / "out", *arguments, "--draft", f"{path}:3")
    assert code == 0
    assert json.loads(converted)["tokens"] == json.loads(plain)["tokens"]


def test_refusals_name_the_file(capsys, tmp_path, path):
    path.write_bytes(path.read_bytes()[:-4000])
    assert f"{path} is truncated" in refused(capsys, "info", path)
    assert "is truncated" in refused(capsys, "generate", path, "--prompt", "a")
    assert "no/such.gguf' is not a model" in refused(capsys, "info", "no/such.gguf")
    assert not (tmp_path / "out").exists()
    with pytest.raises(mlsd.InputError, match="truncated"):
        mlsd.load(path)
