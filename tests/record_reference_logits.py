"""Record what transformers' torch models compute for every family of `tiny`; needs torch.

python tests/record_reference_logits.py

writes tests/reference/<family>.npz: logits [2, T, V] and, for the first row, what each layer returns [T, K], all float32.
"""

import pathlib
import tempfile

import numpy as np
import tiny

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


def main():
    REFERENCE.mkdir(exist_ok=True)
    for name in tiny.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found = record(tiny.write_family(pathlib.Path(folder), name), tiny.tokens())
        found = {key: value if key == "logits" else value[0] for key, value in found.items()}
        np.savez_compressed(REFERENCE / f"{name}.npz", **found)
        print(name, {key: (value.shape, round(float(np.std(value)), 2)) for key, value in found.items()})


if __name__ == "__main__":
    main()
