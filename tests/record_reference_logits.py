"""Record what transformers' torch models compute for every family of `tiny`; needs torch.

python tests/record_reference_logits.py [FAMILY ...]

writes tests/reference/<family>.npz: logits [2, T, V] and, for the first row, what each layer returns [T, K], all float32. Of those
of `family_files` it writes tests/reference/families/<family>.npz: logits [T, V], and the shapes of the tensors of the file that
transformers writes, by name.
"""

import json
import pathlib
import sys
import tempfile

import family_files
import numpy as np
import tiny
from safetensors import safe_open

REFERENCE = pathlib.Path(__file__).parent / "reference"


def torch_model(folder: pathlib.Path):
    """Load a folder in float32 with transformers' plainest attention; every tensor of the folder is used and none is missing."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(info.values()):
        raise ValueError(f"{folder} does not fit transformers' model: {info}")
    return model.eval()


def record(folder: pathlib.Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Run one pass and return `logits` and the output of every layer (`layer_0`, ...), all rows."""
    import torch

    model, outputs = torch_model(folder), {}

    def keep(i):
        def hook(module, inputs, output):
            outputs[f"layer_{i}"] = (output[0] if isinstance(output, tuple) else output).numpy()

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(i))
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits
    return {"logits": logits.numpy()} | outputs


def written(config: dict, folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the file that transformers writes of a model, by name."""
    import transformers

    described = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    auto = transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
    auto.from_config(described).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="np") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}


def logits(folder: pathlib.Path, config: dict) -> np.ndarray:
    """Return transformers' logits [T, V] of a folder, all of whose tensors are used."""
    import torch
    import transformers

    auto = transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    if any(info.values()):
        raise ValueError(f"{folder} does not fit transformers' model: {info}")
    with torch.no_grad():
        return model.eval()(torch.tensor(family_files.tokens(), dtype=torch.long), use_cache=False).logits[0].numpy()


def record_families(chosen: list[str]):
    family_files.REFERENCE.mkdir(exist_ok=True)
    for name, config in family_files.CONFIGS.items():
        if chosen and name not in chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            shapes = written(config, pathlib.Path(folder) / "by transformers")
            found = logits(family_files.write(pathlib.Path(folder) / "ours", name, shapes), config)
        np.savez_compressed(family_files.REFERENCE / f"{name}.npz", logits=found, tensors=json.dumps(shapes))
        print(name, len(shapes), "tensors", found.shape, round(float(np.std(found)), 2))


def main():
    REFERENCE.mkdir(exist_ok=True)
    record_families(sys.argv[1:])
    for name in [] if sys.argv[1:] else tiny.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found = record(tiny.write_family(pathlib.Path(folder), name), tiny.tokens())
        found = {key: value if key == "logits" else value[0] for key, value in found.items()}
        np.savez_compressed(REFERENCE / f"{name}.npz", **found)
        print(name, {key: (value.shape, round(float(np.std(value)), 2)) for key, value in found.items()})


if __name__ == "__main__":
    main()
