"""Which weights of a model are quantized, and to what: the twin of a model is its own weights cast, and nothing else changed.

The paper casts the decoder's linear layers (ML-SpecQD, arXiv 2503.13565); here the lm_head is cast as well, a tied one less
coarsely. Embeddings, norms and biases are the model's own arrays.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlspecqd_jax.errors import InputError
from mlspecqd_jax.weights.cast import SEARCH, check_scale_rule, quantize
from mlspecqd_jax.weights.formats import check_format, format_of
from mlspecqd_jax.weights.layouts import for_device
from mlspecqd_jax.weights.placement import weight_sharding
from mlspecqd_jax.weights.products import array_specs
from mlspecqd_jax.weights.quantized_array import Leaf, QuantizedArray
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD, Tensor
from pallas_kernels.product import STORED_AXES

AUTO, CALIBRATED = "auto", "-calibrated"  # begins the names of twins of so many bits, ends those of calibrated ones
TIED_HEAD = "mxfp8_e4m3"  # of a twin in MXFP4, on CPU

Policy = Mapping[str, str | None]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model was quantized; equal recipes make equal twins."""

    format: str = "mxfp4"
    policy: tuple[tuple[str, str | None], ...] = ()
    scale_rule: str = "floor"
    calibrated: bool = False  # whether its weights were rounded by `calibration`
    bits: float | None = None  # of a weight on average, for which the policy was found

    @property
    def name(self) -> str:
        """What a twin is called, and the folder of a stored one."""
        return (self.format if self.bits is None else f"{AUTO}{self.bits:g}") + CALIBRATED * self.calibrated


def recipe_of_bits(policy: Policy, bits: float, calibrated: bool) -> Recipe:
    """Return the recipe of a twin whose every weight has a format of its own."""
    return Recipe("mxfp4", tuple(policy.items()), SEARCH, calibrated, bits)


def bits_of(name: str) -> float | None:
    """Return the bits that a name such as auto4.5 asks for; None of another, such as a format's."""
    found = re.fullmatch(AUTO + r"(\d+(?:\.\d+)?)", name)
    return None if found is None else float(found[1])


def default_policy(format: str, tied: bool, platform: str) -> Policy:
    """Return the exceptions that serve a twin's drafts best: on CPU, a tied head of an MXFP4 twin in TIED_HEAD.

    Models that tie their head to the embedding are small, and it decides more of their twin's mistakes than of its bytes. Elsewhere
    than on CPU it was not tried.
    """
    return {HEAD: TIED_HEAD} if format == "mxfp4" and tied and platform == "cpu" else {}


def quantize_params(
    params: Mapping[str, jax.Array],
    tensors: Mapping[str, Tensor],
    format: str = "mxfp4",
    policy: Policy | None = None,
    scale_rule: str = "floor",
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    rounded: Mapping[str, QuantizedArray] | None = None,
) -> dict[str, Leaf]:
    """Return the parameters of a model's twin: linear layers and lm_head quantized, everything else the same array objects.

    Weights are cast one at a time. A tied model's embedding stays, and the twin gets a quantized `lm_head.weight` made from it.

    Args:
      params: parameters by Hugging Face's tensor names. A leaf that has its format already stays the same object.
      tensors: what they are, of which those that are `linear` can be quantized.
      format: a name of `formats.FORMATS`.
      policy: exceptions, from a glob over tensor names to a format or None (keep the model's own weight; of a tied head, keep the
        tie). The first glob that matches a name decides.
      scale_rule: a name of `cast.SCALE_RULES`.
      mesh: where to place the new leaves by their axes; None leaves them where their weights are.
      dtype: of the activations, for which new leaves are arranged as their device wants them; None keeps them as they are stored.
      rounded: weights that somebody rounded to their formats already, by name, which are placed and not cast.

    Raises:
      InputError: an unknown format or scale rule, a glob that matches no quantizable weight, a leaf in another format.
    """
    check_scale_rule(scale_rule, format)
    wanted = formats_of(tensors, format, policy or {})
    tensors = with_head(tensors)
    quantized: dict[str, Leaf] = dict(params)
    for name, to in wanted.items():
        w = params[name] if name in params else params[EMBEDDING]
        if to is None or getattr(w, "format", None) == to:
            continue
        if isinstance(w, QuantizedArray):
            raise InputError(f"{name} is in {w.format} already and cannot become {to}; quantize the original model instead")
        # Waiting for each keeps the temporaries of one weight alive, not of all.
        leaf = rounded[name] if rounded and name in rounded else quantize(w, to, rule_of(to, scale_rule))
        leaf = place_quantized(tensors[name], leaf, mesh, dtype)
        quantized[name] = jax.block_until_ready(leaf)
    return quantized


def rule_of(format: str, scale_rule: str) -> str:
    """Return the scale rule for an exception's format: those of MX alone leave other formats with their own."""
    return scale_rule if format_of(format).scale == "e8m0" or scale_rule == SEARCH else "floor"


def with_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the parameters of a twin are: where the embedding is the head too, it may be cast as a linear layer's weight."""
    return dict(tensors) if HEAD in tensors else dict(tensors) | {HEAD: tensors[EMBEDDING]._replace(linear=True, gathered=False)}


def place_quantized(
    tensor: Tensor, leaf: QuantizedArray, mesh: Mesh | None, dtype: jax.typing.DTypeLike | None = None
) -> QuantizedArray:
    """Put a stored weight where its axes say, and arrange it for what is there.

    Without a mesh it comes to the default device, or stays where it is. It is split only where every shard holds whole groups, that
    is, where the mesh divides the scales and no group is partial.

    Args:
      tensor: the parameter, whose axes say over which the weight may be split.
      leaf: as `quantize` made it.
      mesh: over which it is split, or None.
      dtype: of the activations; None leaves it as it is stored.
    """
    if mesh is None:
        leaf = jax.device_put(leaf)
    else:
        f, (n, groups) = format_of(leaf.format), leaf.arrays["scales"].shape
        k = leaf.arrays["codes"].shape[1] * 8 // f.bits
        n = 1 if leaf.shape[0] % f.rows else n
        groups = 1 if "order" in leaf.arrays or k % (f.group or k) else groups
        spec = weight_sharding(tensor.axes, (n, groups), mesh).spec
        specs = array_specs(STORED_AXES, spec, leaf.core) | {role: PartitionSpec(None) for role in leaf.around}
        arrays = jax.device_put(leaf.arrays, {role: NamedSharding(mesh, at) for role, at in specs.items()})
        leaf = dataclasses.replace(leaf, arrays=arrays, spec=spec)
    return leaf if dtype is None else for_device(leaf, dtype=dtype, mesh=mesh, experts=tensor.experts)


def formats_of(tensors: Mapping[str, Tensor], format: str, policy: Policy) -> dict[str, str | None]:
    """Return the format of every weight that can be quantized, by name, None for one that is kept (see `quantize_params`).

    Raises:
      InputError: an unknown format, a glob that matches no such weight, or a format whose scales several experts would share.
    """
    linear = {name: tensor for name, tensor in with_head(tensors).items() if tensor.linear}
    names = list(linear)
    check_format(format)
    for glob, to in policy.items():
        if to is not None:
            check_format(to)
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            kinds = sorted({f"*_{name.rpartition('_')[2]}" if ".layers." in name else name for name in names})
            raise InputError(f"the policy's '{glob}' matches no weight that can be quantized; these can: {', '.join(kinds)}")
    wanted = {name: next((to for glob, to in policy.items() if fnmatch.fnmatchcase(name, glob)), format) for name in names}
    for name, to in wanted.items():
        rows = linear[name].shape[0] // (linear[name].experts or 1)
        if to is not None and linear[name].experts and rows % format_of(to).rows:
            raise InputError(
                f"{name} has {rows} rows for each expert, but {format_of(to).rows} share a scale in {to}; choose another format"
            )
    return wanted
