"""Where a model lies: one of the demo family, a folder, or a download of the hub's."""

import os
import pathlib
import re

from mlspecqd_jax import arguments
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading import huggingface

DEMOS = ("demo", "demo-small")
WANTED = f"an existing folder, an owner/name id of the Hugging Face hub, or one of {', '.join(DEMOS)}"


def find(model: str | os.PathLike) -> pathlib.Path:
    """Return the local folder of a model, downloading it if it is a hub id; other names are refused without network use.

    A name of the demo family is that, whatever the working directory holds; `./demo`, `demo/` and a Path are folders.
    """
    if not is_path(model):
        raise InputError(f"model is {arguments.brief(model)}, but must be {WANTED}")
    if _is_demo(model):
        package = pathlib.Path(__file__).parents[1]
        places = (package / "_demo" / model, package.parent / "checkpoints" / model)  # a wheel, a clone
        return next(place for place in places if place.is_dir())
    if _is_folder(model):
        return pathlib.Path(model)
    if _is_hub_id(model):
        return huggingface.download(str(model))
    raise InputError(f"{arguments.brief(str(model), 300)} is not a model: give {WANTED}")


def is_known(model: str | os.PathLike) -> bool:
    """Return whether `find` would look for a model of this name, without looking on the hub."""
    return _is_demo(model) or _is_folder(model) or _is_hub_id(model)


def is_path(value) -> bool:
    """Return whether a value is a text or a Path that can name something."""
    return isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)


def _is_demo(model) -> bool:
    return isinstance(model, str) and model in DEMOS


def _is_folder(model) -> bool:
    return str(model).splitlines() == [str(model)] and os.path.isdir(model)  # messages hold it, and are one line


def _is_hub_id(model) -> bool:
    return re.fullmatch(r"[\w\-.]+/[\w\-.]+", str(model)) is not None and not str(model).startswith(".")
