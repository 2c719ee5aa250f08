"""Hugging Face checkpoints in: config.json and safetensors to a `ModelConfig` and placed parameters.

Module paths of `transformer` are Hugging Face's tensor names, so the key table of a family is the model's own `shapes()`, and what
differs between families is which optional tensors there are (`FAMILIES`). Headers are checked in full before a tensor is read;
tensors then stream one at a time from the mapped file to their place, so that the process never holds a second model.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from mlspecqd_jax.partition import weight_sharding
from mlspecqd_jax.placement import place
from mlspecqd_jax.transformer import ACTIVATIONS, LanguageModel, ModelConfig, RopeScaling

# Which optional tensors a family has; "config" leaves it to config.json's key of that name.
FAMILIES: dict[str, dict] = {
    "llama": {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "qk_norm": True},
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Why a family outside FAMILIES cannot be read, by a key that its config has.
REFUSALS = (
    (("kv_lora_rank",), "multi-head latent attention"),
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"), "a mixture of experts"),
    (("is_encoder_decoder",), "an encoder-decoder"),
    (("vision_config", "audio_config", "text_config"), "a multimodal model"),
    (("type_vocab_size",), "an encoder"),
)
BALLAST = (r".*rotary_emb\.inv_freq",)
FLOATS = ("F64", "F32", "F16", "BF16")
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def download(repo_id: str) -> pathlib.Path:
    """Fetch the files that a load needs of a hub repository, and return the local folder.

    Raises:
      ValueError: no such repository, or no access to it or to the hub.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(HUB_FILES)))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"'{repo_id}' is not a folder here and not a public model on the hub; "
            "check the spelling, or log in with 'hf auth login' if it is gated or private"
        ) from error
    except Exception as error:  # the hub's, the connection's and the disk's errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"'{repo_id}' could not be downloaded ({reason}); check the connection, or give a local folder") from error


def read_json(path: pathlib.Path) -> dict:
    """Read one JSON object, or say which file is missing or broken."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; the folder needs config.json and .safetensors files as Hugging Face writes them")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, but must hold a JSON object; download it again")
    return value


def read_config(folder: pathlib.Path) -> ModelConfig:
    """Read config.json; absent keys take the defaults of transformers' own config class.

    Raises:
      ValueError: what the model is that cannot be read, or which key is missing or out of range.
    """
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    _refuse(path, raw, family)

    from transformers import CONFIG_MAPPING

    try:
        c = CONFIG_MAPPING[family].from_dict(raw)
    except Exception as error:  # whatever transformers' own validation raises becomes one sentence
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is refused by transformers ({reason}); correct that key") from error

    flags = {name: getattr(c, key) if isinstance(key, str) else key for name, key in FAMILIES[family].items()}
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads or c.num_attention_heads
    if heads % kv_heads:
        raise ValueError(f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    if c.hidden_act not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act '{c.hidden_act}' is not supported; supported: {', '.join(ACTIVATIONS)}")
    theta, scaling = _rope(path, c)
    return ModelConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        hidden_act=c.hidden_act,
        tie_word_embeddings=c.tie_word_embeddings,
        sliding_windows=_sliding_windows(c),
        **flags,
    )


def _refuse(path: pathlib.Path, raw: dict, family: str | None) -> None:
    supported = ", ".join(FAMILIES)
    if family is None:
        raise ValueError(f"{path} has no key 'model_type'; add it (supported: {supported})")
    if family not in FAMILIES:
        why = next((reason for keys, reason in REFUSALS if any(raw.get(key) for key in keys)), "another architecture")
        raise ValueError(f"{path}: model_type '{family}' is {why}, which is not supported; supported: {supported}")
    other = [a for a in raw.get("architectures") or [] if not a.endswith("ForCausalLM")]
    if other:
        raise ValueError(f"{path}: architecture {other[0]} has no language-model head; a ...ForCausalLM checkpoint is needed")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise ValueError(f"{path}: the weights are quantized already ({method}); give the original BF16, FP16 or FP32 checkpoint")
    absent = [key for key in REQUIRED if raw.get(key) is None]
    if absent:
        raise ValueError(f"{path} has no key '{absent[0]}'; add it, or download the file again")


def _rope(path: pathlib.Path, c) -> tuple[float, RopeScaling]:
    rope = dict(c.rope_parameters)
    if "rope_theta" not in rope:
        raise ValueError(f"{path}: rope_parameters differ between layers, which is not supported; only one set for all layers is")
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise ValueError(f"{path}: rope_type '{kind}' is not supported; supported: {', '.join(ROPE_KEYS)}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{path}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; only 1 is")
    absent = [key for key in ROPE_KEYS[kind] if rope.get(key) is None]
    if absent:
        raise ValueError(f"{path}: rope_type '{kind}' needs the key '{absent[0]}'")
    return float(rope["rope_theta"]), RopeScaling(kind, **{key: rope[key] for key in ROPE_KEYS[kind]})


def _sliding_windows(c) -> tuple[int | None, ...]:
    window = getattr(c, "sliding_window", None)
    kinds = getattr(c, "layer_types", None) or ["sliding_attention"] * c.num_hidden_layers
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def eos_token_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """Return the ids that end a text: generation_config.json's eos_token_id (an int or a list), else config.json's."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = read_json(folder / name).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def read_params(folder: pathlib.Path, model: LanguageModel, dtype: jnp.dtype, mesh: Mesh | None) -> dict[str, jax.Array]:
    """Stream every tensor of a checkpoint to its place, in `dtype`.

    Args:
      folder: holds model.safetensors, or shards and model.safetensors.index.json.
      model: what the names and shapes must be.
      dtype: of the parameters.
      mesh: where to place them by the partition table; None is the default device.

    Raises:
      ValueError: files or tensors missing, unknown, of another shape, truncated, or not finite.
    """
    expected = model.shapes()
    located = _locate(folder, expected)
    params = {}
    with tqdm(total=len(expected), desc="Loading weights", unit="tensor", disable=None, leave=False) as bar:
        for file, names in located.items():
            with safe_open(file, framework="np") as tensors:
                for name in names:
                    params[name] = _place(name, tensors.get_tensor(name), dtype, mesh, file)
                    bar.update()
    return {name: params[name] for name in expected}


def _locate(folder: pathlib.Path, expected: dict[str, tuple[int, ...]]) -> dict[pathlib.Path, list[str]]:
    """Check every header against the expected names and shapes; return the names to read from each file."""
    located, problems, found = {}, [], set()
    for file in _files(folder):
        try:
            with safe_open(file, framework="np") as tensors:
                headers = {name: tensors.get_slice(name) for name in tensors.keys()}
                headers = {name: (tuple(h.get_shape()), h.get_dtype()) for name, h in headers.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error
        for name, (shape, stored) in headers.items():
            if name not in expected:
                if not (name == "lm_head.weight" or any(re.fullmatch(p, name) for p in BALLAST)):
                    problems.append(f"unknown tensor {name}")
            elif shape != expected[name]:
                problems.append(f"tensor {name} has shape {list(shape)}, but config.json asks for {list(expected[name])}")
            elif stored not in FLOATS:
                problems.append(f"tensor {name} is stored as {stored}, but must be one of {', '.join(FLOATS)}")
            else:
                found.add(name)
                located.setdefault(file, []).append(name)
    named = {problem.split(" ")[1] for problem in problems if problem.startswith("tensor ")}
    problems += [f"missing tensor {name}" for name in expected if name not in found | named]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"{folder} does not hold the model that its config.json describes: {'; '.join(problems[:3])}{more}; "
            "download the weights and config.json again from one source"
        )
    return located


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{index} has no key 'weight_map' that maps tensors to files; download it again")
        files = [folder / name for name in dict.fromkeys(shards.values())]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ValueError(f"{index} names the shard {absent[0]}, which is not in the folder; download it")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ValueError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json; save the model with save_pretrained(folder)"
    )


@jax.jit
def _all_finite(x):
    # 0 times NaN or infinity is NaN; a sum compiles and runs about four times as fast on the CPU as `all(isfinite(x))`.
    return jnp.sum(x * 0, dtype=jnp.float32) == 0


def _place(name: str, tensor: np.ndarray, dtype: jnp.dtype, mesh: Mesh | None, file: pathlib.Path) -> jax.Array:
    with np.errstate(over="ignore"):  # an overflow to infinity is reported below, by name
        tensor = np.asarray(tensor, dtype)
    sharding = None if mesh is None else weight_sharding(name, tensor.shape, mesh)
    placed = jax.block_until_ready(place(tensor, sharding))
    if not _all_finite(placed):
        raise ValueError(
            f"{file}: tensor {name} holds NaN or infinity in {jnp.dtype(dtype).name}; use an intact checkpoint or a wider dtype"
        )
    return placed
