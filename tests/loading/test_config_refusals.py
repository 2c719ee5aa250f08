"""config.json: one sentence for whatever it cannot mean, and a type and a range for every key."""

import math

import pytest
from configs import LLAMA, MINIMAL, parse
from refusals import refused

from mlspecqd_jax import arguments
from mlspecqd_jax.loading import config_file


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "dots1", "n_routed_experts": 8} | MINIMAL, ("dots1", "a mixture of experts")),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3} | MINIMAL, ("3 of 2 experts", "these keys")),
        ({"model_type": "mixtral", "num_local_experts": 0} | MINIMAL, ("num_local_experts is 0", "a whole number from 1")),
        (
            {"model_type": "glm4_moe", "head_dim": 16, "n_routed_experts": 8, "n_group": 3} | MINIMAL,
            ("8 experts in n_group 3", "these keys"),
        ),
        (
            {"model_type": "glm4_moe", "head_dim": 16, "n_routed_experts": 8, "n_group": 4, "num_experts_per_tok": 3} | MINIMAL,
            ("n_group 4 groups of which topk_group 1", "do not give 3"),
        ),
        (
            {"model_type": "gpt_oss", "num_local_experts": 32, "rope_scaling": {"rope_type": "yarn"}} | MINIMAL,
            ("rope_parameters", "yarn", "'factor'"),
        ),
        ({"model_type": "olmo_hybrid"} | MINIMAL, ("olmo_hybrid", "recurrent layers (gated delta nets)")),
        ({"model_type": "granitemoehybrid", "num_local_experts": 8} | MINIMAL, ("granitemoehybrid", "(a state space)")),
        (
            {"model_type": "qwen3_5", "text_config": {"linear_num_value_heads": 24}, "vision_config": {}},
            ("linear_num_value_heads 24", "a multiple of linear_num_key_heads 16"),
        ),
        ({"model_type": "qwen3_5_text", "linear_conv_kernel_dim": 0} | MINIMAL, ("linear_conv_kernel_dim is 0", "from 1")),
        ({"model_type": "gemma4_assistant", "text_config": {"vocab_size": 9}}, ("gemma4_assistant", "another model computes")),
        ({"model_type": "pixtral_9", "text_config": {"vocab_size": 9}, "vision_config": {}}, ("pixtral_9", "a multimodal model")),
        ({"model_type": "bloom", "n_layer": 2}, ("bloom", "ALiBi")),
        ({"model_type": "lfm2", "layer_types": ["conv"]} | MINIMAL, ("is ['conv']", "full_attention, conv for each of 3")),
        ({"model_type": "lfm2", "block_ff_dim": "x"} | MINIMAL, ("intermediate_size is 'x'", "a whole number")),
        ({"model_type": "gemma3", "vision_config": {}}, ("'text_config'", "add it")),
        ({"model_type": "gemma3", "text_config": [1]}, ("text_config is [1]", "an object of model_type gemma3_text")),
        ({"model_type": "gemma3", "text_config": {"model_type": "llama"} | MINIMAL}, ("text_config", "model_type gemma3_text")),
        ({"model_type": "gemma3", "text_config": {"head_dim": "x"}}, ("head_dim is 'x'", "a whole number")),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForSequenceClassification"], "text_config": {}}, ("no language-model",)),
        ({"model_type": "gemma2", "hidden_activation": "tanh"} | MINIMAL, ("hidden_activation 'tanh'", "silu")),
        ({"model_type": "gemma2", "attn_logit_softcapping": 0} | MINIMAL, ("attn_logit_softcapping is 0", "a number from")),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True} | MINIMAL, ("only causal attention",)),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default"}} | MINIMAL,
            ("rope_parameters", "full_attention"),
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "axial"}}} | MINIMAL,
            ("axial", "supported: default, linear, llama3"),
        ),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear"}} | MINIMAL, ("linear", "'factor'")),
        ({"model_type": "bert", "type_vocab_size": 2} | MINIMAL, ("bert", "an encoder")),
        ({"model_type": "t5", "is_encoder_decoder": True, "d_model": 512}, ("t5", "an encoder-decoder")),
        ({"model_type": "gpt2", "n_embd": 768, "n_layer": 2, "n_head": 4}, ("'vocab_size'", "add it")),
        ({"model_type": "gpt2", "vocab_size": 97, "n_embd": 768, "n_layer": 2}, ("'n_head'", "add it")),
        ({"model_type": "falcon", "alibi": True} | MINIMAL, ("alibi of falcon", "only rotary positions")),
        ({"model_type": "stablelm", "qk_layernorm": True} | MINIMAL, ("qk_layernorm of stablelm",)),
        (
            {"model_type": "openai-gpt", "n_embd": 768},
            ("openai-gpt", "another architecture", "supported: llama, mistral"),
        ),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, ("yarn", "'factor'")),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5} | MINIMAL, ("rotates 3 of 6 elements", "even")),
        (
            LLAMA | {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0, "x", 2.0]}},
            ("long_factor is [1.0, 'x', 2.0]", "3 numbers"),
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]} | MINIMAL, ("no_rope_layers is [1, 0]", "3 numbers")),
        ({"model_type": "mistral3", "text_config": {"model_type": "qwen3"}, "vision_config": {}}, ("qwen3", "mistral")),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, ("'vocab_size'", "add it")),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ("dynamic", "supported: default, linear, llama3")),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, ("linear", "factor")),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, ("llama3", "high_freq_factor")),
        (LLAMA | {"partial_rotary_factor": 0.5}, ("partial_rotary_factor 0.5", "only 1")),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequenceClassification", "CausalLM")),
        (LLAMA | {"hidden_act": "tanh"}, ("hidden_act 'tanh'", "silu")),
        (LLAMA | {"num_key_value_heads": 5}, ("num_key_value_heads 5", "32")),
        (LLAMA | {"hidden_size": "wide"}, ("hidden_size", "wide")),
        (LLAMA | {"head_dim": 7}, ("head_dim", "7", "even")),
        (MINIMAL, ("model_type", "add it")),
        *[
            ({key: value for key, value in LLAMA.items() if key != absent}, (f"'{absent}'", "add it", "config.json"))
            for absent in MINIMAL
        ],
        (
            {"model_type": "qwen3", "num_key_value_heads": 4, "layer_types": ["full_attention"] * 3}
            | MINIMAL
            | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            ("rope_parameters", "layer"),
        ),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path, config, words):
    with refused(*words):
        parse(tmp_path, config)


def test_no_config(tmp_path):
    with refused("config.json", "missing", "safetensors"):
        config_file.read_config(tmp_path)


@pytest.mark.parametrize(("text", "words"), [("{", ("not valid JSON",)), ("[1]", ("a list", "JSON object"))])
def test_a_broken_config(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with refused("config.json", "download it again", *words):
        config_file.read_config(tmp_path)


def outside(rule):
    """Return values that a rule must not allow, and how it is told."""
    yield from [value for value in (True, "8", 8, 8.5, [8], {"a": 8}, math.nan) if not rule.allows(value)]
    if math.isfinite(rule.least):
        yield from (rule.least - 1, rule.most + 1, -math.inf, math.inf, 10**400, -(10**400))
    if not rule.null:
        yield None


@pytest.mark.parametrize("key", config_file.KEYS)
def test_every_key_has_a_type_and_a_range(tmp_path, key):
    rule = config_file.KEYS[key]
    assert len(list(outside(rule))) >= 4
    for value in outside(rule):
        if value is not None or key not in config_file.REQUIRED:  # else it is absent
            with refused("config.json", f"{key} is {arguments.brief(value)}", f"must be {rule}", "correct that key"):
                parse(tmp_path, LLAMA | {key: value})


@pytest.mark.parametrize("key", config_file.ROPE_KEYS)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_every_key_of_rope_has_a_type_and_a_range(tmp_path, spelling, key):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for value in outside(config_file.ROPE_KEYS[key]):
        with refused("config.json", f"{spelling}: {key} is", "must be", "correct that key"):
            parse(tmp_path, LLAMA | {spelling: rope | {key: value}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**6}, ("num_hidden_layers is 1000000", "from 1 to 1,024")),
        ({"rope_theta": 0}, ("rope_theta is 0", "a number from 1 to")),
        ({"rope_theta": "1e6"}, ("rope_theta is '1e6'", "a number")),
        ({"sliding_window": 0}, ("sliding_window is 0", "or null")),
        ({"head_dim": 0}, ("head_dim is 0",)),
        ({"hidden_size": 32, "num_attention_heads": 32}, ("head_dim is 1", "even")),
        ({"layer_types": ["full_attention"]}, ("layer_types", "each of 3 layers")),
        ({"layer_types": ["full_attention", "other", "full_attention"]}, ("layer_types", "sliding_attention")),
        ({"layer_types": [["full_attention"]] * 3}, ("layer_types", "sliding_attention")),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "extra": 1}}, ("'extra'", "factor")),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4}}, ("greater than",)),
        ({"rope_scaling": [1]}, ("rope_scaling is [1]", "an object or null")),
        ({"model_type": ["llama"]}, ("model_type ['llama']", "supported")),
        ({"architectures": "LlamaForTokenClassification"}, ("LlamaForTokenClassification", "CausalLM")),
        ({"architectures": ["Qwen2Model"]}, ("Qwen2Model", "CausalLM")),
        ({"architectures": [3]}, ("architectures is [3]", "list of names")),
        ({"architectures": {"a": 1}}, ("architectures is", "list of names")),
    ],
)
def test_values_that_no_model_has(tmp_path, change, words):
    with refused("config.json", *words):
        parse(tmp_path, LLAMA | change)
