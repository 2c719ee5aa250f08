"""Where a model lies: one of the demo family, a folder, a GGUF file, or a download of the hub's."""

import os
import pathlib
import re

from mlspecqd_jax import arguments
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading import huggingface
from mlspecqd_jax.loading.gguf.reader import is_gguf, parts_of

CONFIG = "config.json"
DEMOS = ("demo", "demo-small")
WANTED = (
    "an existing folder, an owner/name id of the Hugging Face hub, a .gguf file (FILE.gguf, or owner/name/FILE.gguf of the hub), "
    f"or one of {', '.join(DEMOS)}"
)


def find(model: str | os.PathLike) -> pathlib.Path:
    """Return the local folder or GGUF file of a model, downloading it from the hub if its name is one of those.

    Other names are refused without network use.

    A name of the demo family is that, whatever the working directory holds; `./demo`, `demo/` and a Path are folders.
    """
    if not is_path(model):
        raise InputError(f"model is {arguments.brief(model)}, but must be {WANTED}")
    if _is_demo(model):
        package = pathlib.Path(__file__).parents[1]
        places = (package / "_demo" / model, package.parent / "checkpoints" / model)  # a wheel, a clone
        return next(place for place in places if place.is_dir())
    if _is_folder(model) or _is_file(model):
        return pathlib.Path(model)
    if _is_hub_file(model):
        return _hub_file(str(model))
    if _is_hub_id(model):
        return huggingface.download(str(model))
    raise InputError(f"{arguments.brief(str(model), 300)} is not a model: give {WANTED}")


def find_config(model: str | os.PathLike) -> pathlib.Path:
    """Return the local folder, GGUF file or config.json that tells what a model is; no weights are downloaded.

    Args:
      model: as for `find`, or the path of a config.json. Of a hub id config.json is downloaded; a GGUF file of the hub must have
        been, since what it is stands in the file.
    """
    if is_path(model) and _is_config(model):
        return pathlib.Path(model)
    if is_path(model) and not _is_folder(model) and _is_hub_file(model):
        return _hub_file(str(model), fetch=False)
    if is_path(model) and not _is_folder(model) and _is_hub_id(model):
        return huggingface.download(str(model), [CONFIG]) / CONFIG
    return find(model)


def is_known(model: str | os.PathLike) -> bool:
    """Return whether `find` would look for a model of this name, without looking on the hub."""
    return _is_demo(model) or _is_folder(model) or _is_file(model) or _is_hub_file(model) or _is_hub_id(model)


def is_path(value) -> bool:
    """Return whether a value is a text or a Path that can name something."""
    return isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)


def _is_demo(model) -> bool:
    return isinstance(model, str) and model in DEMOS


def _is_folder(model) -> bool:
    return str(model).splitlines() == [str(model)] and os.path.isdir(model)  # messages hold it, and are one line


def _is_file(model) -> bool:
    return str(model).splitlines() == [str(model)] and is_gguf(model) and os.path.isfile(model)


def _is_config(model) -> bool:
    return str(model).splitlines() == [str(model)] and str(model).endswith(".json") and os.path.isfile(model)


def _is_hub_id(model) -> bool:
    named = re.fullmatch(r"[\w\-.]+/[\w\-.]+", str(model)) is not None
    return named and not str(model).startswith(".") and not is_gguf(model)


def _is_hub_file(model) -> bool:
    parts = str(model).split("/")
    named = len(parts) > 2 and all(re.fullmatch(r"[\w\-.]+", part) and not part.startswith(".") for part in parts)
    return named and is_gguf(model)


def _hub_file(model: str, fetch: bool = True) -> pathlib.Path:
    """Download one GGUF file of a repository, with the other parts of a split one, or find what was downloaded before."""
    owner, name, *folders, file = model.split("/")
    if fetch:
        folder = huggingface.download(f"{owner}/{name}", ["/".join([*folders, part]) for part in parts_of(file)])
    else:
        folder = huggingface.downloaded(f"{owner}/{name}")
    path = pathlib.Path() if folder is None else folder.joinpath(*folders, file)
    if not fetch and not os.path.isfile(path):
        raise InputError(
            f"{model} has not been downloaded, and what it is stands in the file itself; download it (mlspecqd generate does, or "
            f"hf download {owner}/{name} {'/'.join([*folders, file])})"
        )
    if not os.path.isfile(path):
        raise InputError(
            f"'{owner}/{name}' on the hub has no file {arguments.brief('/'.join([*folders, file]))}; check the spelling"
        )
    return path
