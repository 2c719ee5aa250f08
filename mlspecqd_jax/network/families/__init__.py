"""What each family of models is: a function from transformers' config to a `Config`, by the model_type of config.json."""

from mlspecqd_jax.network.config import Config
from mlspecqd_jax.network.families.apertus import apertus
from mlspecqd_jax.network.families.cohere import cohere, cohere2
from mlspecqd_jax.network.families.deepseek import deepseek_v2, deepseek_v3, glm4_moe_lite, mistral4, youtu
from mlspecqd_jax.network.families.ernie4_5 import ernie4_5, ernie4_5_moe
from mlspecqd_jax.network.families.exaone4 import exaone4
from mlspecqd_jax.network.families.falcon import falcon
from mlspecqd_jax.network.families.gemma import gemma
from mlspecqd_jax.network.families.gemma2 import gemma2
from mlspecqd_jax.network.families.gemma3 import gemma3
from mlspecqd_jax.network.families.gemma4 import gemma4
from mlspecqd_jax.network.families.glm import glm, glm4
from mlspecqd_jax.network.families.glm4_moe import glm4_moe
from mlspecqd_jax.network.families.gpt2 import gpt2, gpt_bigcode
from mlspecqd_jax.network.families.gpt_neox import gpt_neox
from mlspecqd_jax.network.families.gpt_oss import gpt_oss
from mlspecqd_jax.network.families.gptj import gptj
from mlspecqd_jax.network.families.granite import granite, granite_swa, granitemoe, hyperclovax
from mlspecqd_jax.network.families.helium import helium
from mlspecqd_jax.network.families.hunyuan import hunyuan, hunyuan_moe
from mlspecqd_jax.network.families.lfm2 import lfm2, lfm2_moe, lfm3
from mlspecqd_jax.network.families.llama import llama
from mlspecqd_jax.network.families.llama4 import llama4
from mlspecqd_jax.network.families.ministral3 import ministral3
from mlspecqd_jax.network.families.mistral import mistral
from mlspecqd_jax.network.families.mixtral import minimax_m2, mixtral
from mlspecqd_jax.network.families.nemotron import arcee, jais2, nemotron
from mlspecqd_jax.network.families.olmo import olmo
from mlspecqd_jax.network.families.olmo2 import olmo2, olmo3
from mlspecqd_jax.network.families.olmoe import olmoe
from mlspecqd_jax.network.families.phi import phi
from mlspecqd_jax.network.families.phi3 import phi3
from mlspecqd_jax.network.families.qwen2 import qwen2
from mlspecqd_jax.network.families.qwen3 import qwen3
from mlspecqd_jax.network.families.qwen3_next import qwen3_5, qwen3_5_moe, qwen3_next
from mlspecqd_jax.network.families.qwen_moe import qwen2_moe, qwen3_moe
from mlspecqd_jax.network.families.seed_oss import seed_oss
from mlspecqd_jax.network.families.smollm3 import smollm3
from mlspecqd_jax.network.families.stablelm import stablelm
from mlspecqd_jax.network.families.starcoder2 import starcoder2
from mlspecqd_jax.network.families.vaultgemma import vaultgemma

FAMILIES = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gemma4_text": gemma4,
    "gemma4_unified_text": gemma4,
    "gemma": gemma,
    "vaultgemma": vaultgemma,
    "granite": granite,
    "hyperclovax": hyperclovax,
    "olmo": olmo,
    "smollm3": smollm3,
    "phi3": phi3,
    "glm": glm,
    "glm4": glm4,
    "cohere": cohere,
    "cohere2": cohere2,
    "ernie4_5": ernie4_5,
    "helium": helium,
    "seed_oss": seed_oss,
    "ministral": mistral,
    "cwm": mistral,
    "ministral3": ministral3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "exaone4": exaone4,
    "hunyuan_v1_dense": hunyuan,
    "granite_swa": granite_swa,
    "gpt2": gpt2,
    "gpt_bigcode": gpt_bigcode,
    "gptj": gptj,
    "gpt_neox": gpt_neox,
    "phi": phi,
    "falcon": falcon,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
    "nemotron": nemotron,
    "arcee": arcee,
    "jais2": jais2,
    "apertus": apertus,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "mixtral": mixtral,
    "minimax_m2": minimax_m2,
    "gpt_oss": gpt_oss,
    "glm4_moe": glm4_moe,
    "granitemoe": granitemoe,
    "granitemoeshared": granitemoe,
    "olmoe": olmoe,
    "llama4_text": llama4,
    "ernie4_5_moe": ernie4_5_moe,
    "hunyuan_v1_moe": hunyuan_moe,
    "qwen3_next": qwen3_next,
    "qwen3_5_text": qwen3_5,
    "qwen3_5_moe_text": qwen3_5_moe,
    "lfm2": lfm2,
    "lfm2_moe": lfm2_moe,
    "lfm3": lfm3,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "glm4_moe_lite": glm4_moe_lite,
    "mistral4": mistral4,
    "youtu": youtu,
    "qwen2_vl_text": qwen2,
    "qwen2_5_vl_text": qwen2,
    "qwen3_vl_text": qwen3,
}


def config_of(model_type: str, **keys) -> Config:
    """Return what a config.json of a family with these keys describes; absent ones take transformers' defaults."""
    from transformers import CONFIG_MAPPING

    return FAMILIES[model_type](CONFIG_MAPPING[model_type](**keys))
