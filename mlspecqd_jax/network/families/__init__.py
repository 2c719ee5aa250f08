"""What each family of models is: a function from transformers' config to a `Config`, by the model_type of config.json."""

from mlspecqd_jax.network.config import Config
from mlspecqd_jax.network.families.gemma2 import gemma2
from mlspecqd_jax.network.families.gemma3 import gemma3
from mlspecqd_jax.network.families.llama import llama
from mlspecqd_jax.network.families.mistral import mistral
from mlspecqd_jax.network.families.qwen2 import qwen2
from mlspecqd_jax.network.families.qwen3 import qwen3

FAMILIES = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
}


def config_of(model_type: str, **keys) -> Config:
    """Return what a config.json of a family with these keys describes; absent ones take transformers' defaults."""
    from transformers import CONFIG_MAPPING

    return FAMILIES[model_type](CONFIG_MAPPING[model_type](**keys))
