"""Experts that a file holds in one tensor, gate_up_proj [E, 2 I, K] and down_proj [E, K, I], where others have a module for each.

Both are files of the same model_type: transformers writes the one, and takes the other too (Qwen3.5's).
"""

import pathlib
import re
from collections.abc import Mapping

from mlspecqd_jax.loading.weight_files import headers, own_name
from mlspecqd_jax.weights.tensors import Source, Tensor

MODULE = re.compile(r"(.+\.experts)\.0\.(gate|up|down)_proj\.weight")


def as_stored(folder: pathlib.Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the parameters are, those of experts by the tensors that the folder holds of them.

    Raises:
      InputError: its files cannot be read.
    """
    stacked = {name: found for name, tensor in expected.items() if (found := _stacked(tensor)) is not None}
    if not stacked:
        return dict(expected)
    wanted = {source for tensor in stacked.values() for source in tensor.sources[0].names}
    there = {own_name(place.name, wanted) for place in headers(folder)[0]}
    stored = {name: tensor for name, tensor in stacked.items() if tensor.sources[0].names[0] in there}
    return {name: stored.get(name, tensor) for name, tensor in expected.items()}


def _stacked(tensor: Tensor) -> Tensor | None:
    """Return a parameter as rows of one tensor, if it is rows of a module for each expert."""
    number, module = tensor.experts, MODULE.fullmatch(tensor.sources[0].names[0])
    if number is None or module is None:
        return None
    rows = tensor.shape[0] // number
    at = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", rows), "down": ("down_proj", 0)}[module[2]]
    return tensor._replace(sources=(Source((f"{module[1]}.{at[0]}",), number, at[1], at[1] + rows, stack=number),))
