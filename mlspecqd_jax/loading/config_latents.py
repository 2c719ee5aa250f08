"""What transformers does not check of the keys of models with latent attention (DeepSeek, GLM-4.7-Flash, Mistral 4, Youtu)."""

import pathlib

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.network.rope import rotated

LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4", "youtu")
METHODS = ("greedy", "group_limited_greedy")
NEEDED = ("v_head_dim", "num_experts_per_tok", "first_k_dense_replace", "norm_topk_prob")


def check_latents(path: pathlib.Path, c, family: str) -> None:
    """Raise an InputError unless sizes fit each other and nothing is missing.

    Args:
      path: of the config.json.
      c: transformers' config.
      family: its model_type.
    """
    if family not in LATENT:
        return
    method = getattr(c, "topk_method", "group_limited_greedy")
    if method not in METHODS:
        raise InputError(f"{path}: topk_method {brief(method)} is not supported; supported: {', '.join(METHODS)}")
    needed = (*NEEDED, *(("n_group", "topk_group") if method != "greedy" else ()))
    absent = [key for key in needed if getattr(c, key, 0) is None]
    if absent:
        raise InputError(f"{path} has no key '{absent[0]}'; add it, or download the file again")
    turned = rotated(c.rope_parameters, c.head_dim)
    if turned != c.qk_rope_head_dim or turned % 2:
        raise InputError(
            f"{path}: qk_rope_head_dim is {c.qk_rope_head_dim}, but must be even and what rope_parameters rotate, {turned}; "
            "correct these keys"
        )
    kinds = getattr(c, "mlp_layer_types", None)
    if kinds is not None and (len(kinds) != c.num_hidden_layers or any(kind not in ("dense", "sparse") for kind in kinds)):
        raise InputError(
            f"{path}: mlp_layer_types is {brief(kinds)}, but must name dense or sparse for each of {c.num_hidden_layers} layers"
        )
