"""Drafters as written on the command line: SPEC = BASE[:LEN], outermost first.

BASE is a FORMAT (the twin of the level above), MODEL[@FORMAT], `ngram`, or `none` (plain decoding, alone); LEN is the draft_len:
one fixes all lengths, and without any drafts are as long as pays. In place of a FORMAT, `auto` and a number, such as auto4.5, is a
format for each weight, so many bits on average. A MODEL that is quantized already is read as it is stored, as the twin of the level
above where it can be that; a GGUF file with a FORMAT is dequantized, and cast anew.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.find import is_known
from mlspecqd_jax.loading.gguf.reader import is_gguf
from mlspecqd_jax.loading.model import Model
from mlspecqd_jax.loading.models import is_quantized
from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup
from mlspecqd_jax.speculation.stack import Stack
from mlspecqd_jax.stacks import check_draft_len, default_draft_len, stack, twin
from mlspecqd_jax.weights.formats import FORMATS
from mlspecqd_jax.weights.quantization import bits_of

NGRAM, NONE, AUTO = "ngram", "none", "auto"


class Spec(NamedTuple):
    """One drafter, named but not loaded."""

    model: str | None  # None: the level above (or, without a format too, prompt look-up)
    format: str | None  # None: as it is
    draft_len: int | None  # None: the default


LOOKUP = Spec(None, None, None)


def parse(specs: Sequence[str], calibrate: bool = False) -> list[Spec]:
    """Read SPECs; no model is loaded and no network used.

    Args:
      specs: as written.
      calibrate: whether twins are to be calibrated, of which there must be one then.

    Raises:
      InputError: a SPEC that is none, or a twin where there are no weights to cast.
    """
    if NONE in specs:
        if len(specs) > 1:
            raise InputError("--draft none is plain decoding and stands alone; leave the other drafts out")
        if calibrate:
            raise InputError("--calibrate rounds twins, and --draft none has none; leave one of the two out")
        return []
    found = [_parse(spec, above) for spec, above in zip(specs, [None, *specs], strict=False)]
    if calibrate and specs and not any(spec.format for spec in found):
        raise InputError(
            f"--calibrate rounds twins, and {' '.join(specs)} has none; add one, such as --draft mxfp4, or leave it out"
        )
    return found


def _parse(spec: str, above: str | None) -> Spec:
    ended = re.fullmatch(r"(.*):(\d+)", spec, re.DOTALL)
    base, digits = ended.groups() if ended else (spec, None)
    draft_len = None if digits is None else check_draft_len(int(digits))
    if above is not None and above.partition(":")[0] == NGRAM:
        raise InputError(f"--draft {spec} cannot draft for ngram, which has no weights; put ngram last")
    if base == NGRAM:
        return LOOKUP._replace(draft_len=draft_len)
    if _is_format(base):
        return Spec(None, base, draft_len)
    model, _, format_ = base.rpartition("@")
    if model and _is_format(format_) and is_known(model):
        return Spec(model, format_, draft_len)
    if is_known(base):
        return Spec(base, None, draft_len)
    raise InputError(
        f"--draft {spec} is no draft: give a format ({', '.join(FORMATS)}, or auto and bits, as auto4.5) for the twin of the level "
        "above, ngram, none, or a model (an existing folder or .gguf file, an owner/name id, demo or demo-small) with @ and a "
        "format or without; a colon and a length may end it"
    )


def _is_format(name: str) -> bool:
    return name in FORMATS or bits_of(name) is not None


def drafters(specs: Sequence[Spec], target: Model, load: Callable[..., Model], calibrate: bool = False) -> list[tuple[Any, int]]:
    """Turn specs into the (drafter, draft_len) pairs that `stack` takes; `load` is asked for the models that they name.

    Args:
      specs: of `parse`.
      target: what they draft for.
      load: such as `models.load`.
      calibrate: of `Model.quantized`, for every twin in a format.

    Raises:
      InputError: what `load` raises, or a format for a model that is quantized already.
    """
    pairs, above = [], target  # the model of the level above, not quantized
    twins = functools.cache(twin)  # so that two levels in one format share their weights
    for i, spec in enumerate(specs):
        if spec == LOOKUP._replace(draft_len=spec.draft_len):
            drafter = PromptLookup()
        elif spec.model is not None and not (spec.format and is_gguf(spec.model)) and is_quantized(spec.model):
            if spec.format is not None:
                raise InputError(f"--draft {spec.model}@{spec.format}: {spec.model} is quantized already; leave @{spec.format} out")
            drafter = load(spec.model, twin_of=above)
            above = above if drafter.network == above.network else drafter  # whose weights, not quantized, are that model's
        else:
            above = above if spec.model is None else load(spec.model)
            drafter = above if spec.format is None else twins(above, spec.format, calibrate)
        auto = lengths(specs) == "auto"
        pairs.append((drafter, spec.draft_len or default_draft_len(drafter, nested=i > 0, auto=auto)))
    return pairs


def stack_of(specs: Sequence[Spec], target: Model, load: Callable[..., Model], calibrate: bool = False, **options: Any) -> Stack:
    """Return the stack of a target and what specs name, with lengths as they say; the arguments are those of `drafters`.

    Args:
      **options: of `stack`.
    """
    return stack(target, *drafters(specs, target, load, calibrate), lengths=lengths(specs), **options)


def lengths(specs: Sequence[Spec]) -> str:
    """Return whether drafts are as long as pays or as they are written, as `stack` takes it: one LEN fixes all."""
    return "auto" if specs and all(spec.draft_len is None for spec in specs) else "fixed"
