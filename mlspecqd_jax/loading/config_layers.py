"""What config.json says of single layers: sizes of their heads, whose keys and values they read (Gemma 4), and their experts."""

import pathlib
from typing import Any

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.config_keys import KEYS, check_table
from mlspecqd_jax.network.config import Config, Experts, Router

LAYER_TYPES = ("full_attention", "sliding_attention")
GEMMA4 = ("gemma4_text", "gemma4_unified_text")
SIZES = ("head_dim", "num_key_value_heads")  # that may differ, in per_layer_config
OF_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")


def check_sizes_of_layers(path: pathlib.Path, raw: dict) -> None:
    """Raise an InputError unless per_layer_config, where there is one, gives sizes of some layers' heads."""
    for layer, sizes in (raw.get("per_layer_config") or {}).items():
        if not layer.isdecimal() or not isinstance(sizes, dict) or not sizes.keys() <= set(SIZES):
            raise InputError(
                f"{path}: per_layer_config has {brief(layer)}: {brief(sizes)}, but may have {' and '.join(SIZES)} of a layer"
            )
        check_table(path, sizes, {key: KEYS[key] for key in SIZES}, within=f"per_layer_config: {layer}: ")


def by_kind(path: pathlib.Path, c, family: str) -> dict[str, Any]:
    """Return transformers' config of the layers of each kind, which has their sizes.

    Raises:
      InputError: layers of one kind differ, no earlier layer has the keys and values that one is to read, or a key is missing.
    """
    if family not in GEMMA4:
        return dict.fromkeys(LAYER_TYPES, c)
    kinds, keeping = c.layer_types, c.num_hidden_layers - c.num_kv_shared_layers
    lacking = next((kind for kind in kinds[max(keeping, 0) :] if kind not in kinds[: max(keeping, 0)]), None)
    if lacking is not None:
        raise InputError(
            f"{path}: num_kv_shared_layers is {c.num_kv_shared_layers} of {len(kinds)} layers, but no layer before those is of "
            f"type {lacking}, whose keys and values they could read; correct that key"
        )
    absent = [key for key in OF_EXPERTS if getattr(c, "enable_moe_block", False) and getattr(c, key) is None]
    ropes = {kind: c.rope_parameters.get(kind) or {} for kind in dict.fromkeys(kinds)}
    needed = ("rope_type", "rope_theta")
    absent += [f"rope_parameters: {kind}: {key}" for kind, rope in ropes.items() for key in needed if rope.get(key) is None]
    if absent:
        raise InputError(f"{path} has no key '{absent[0]}'; add it, or download the file again")
    if getattr(c, "hidden_size_per_layer_input", 0) and c.vocab_size_per_layer_input < c.vocab_size:
        raise InputError(
            f"{path}: vocab_size_per_layer_input is {c.vocab_size_per_layer_input}, but must be at least vocab_size {c.vocab_size}"
        )
    try:
        return {kind: c.per_layer_config[kind] for kind in dict.fromkeys(kinds)}
    except ValueError as error:
        raise InputError(f"{path}: per_layer_config differs between layers of one type, which is not supported") from error


def check_routers(path: pathlib.Path, config: Config) -> None:
    """Raise an InputError unless each layer has as many experts as it chooses."""
    for feed in dict.fromkeys(layer.feed for layer in config.layers):
        if isinstance(feed, Experts):
            _check_router(path, feed.router)


def _check_router(path: pathlib.Path, router: Router) -> None:
    within, groups = router.experts // router.groups * router.groups_chosen, router.groups
    if router.chosen > router.experts:
        raise InputError(f"{path}: positions are given to {router.chosen} of {router.experts} experts; correct these keys")
    if router.experts % groups or router.groups_chosen > groups or router.chosen > within:
        raise InputError(
            f"{path}: {router.experts} experts in n_group {groups} groups of which topk_group {router.groups_chosen} are chosen do "
            f"not give {router.chosen} experts; correct these keys"
        )
