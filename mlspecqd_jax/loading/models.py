"""`load`: a demo, a folder (a converted one too), a GGUF file or a hub id to a `Model`; `convert`: a model to what loads faster."""

import dataclasses
import json
import os
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlspecqd_jax import arguments, console, jax_settings
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading import checkpoint, precision_search
from mlspecqd_jax.loading.calibrating import calibrated_weights
from mlspecqd_jax.loading.find import find, is_path
from mlspecqd_jax.loading.gguf import reader
from mlspecqd_jax.loading.origin import Origin, origin
from mlspecqd_jax.loading.quantized.method import Quantization, find_quantization
from mlspecqd_jax.loading.quantized.params import packed
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.text import chat
from mlspecqd_jax.text.card import Card
from mlspecqd_jax.user_cache import cache_folder
from mlspecqd_jax.weights.cast import check_scale_rule
from mlspecqd_jax.weights.formats import FORMATS, check_format
from mlspecqd_jax.weights.placement import usable_mesh
from mlspecqd_jax.weights.quantization import CALIBRATED, Policy, Recipe, default_policy, formats_of, quantize_params
from mlspecqd_jax.weights.quantized_array import Leaf
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD, parameters

DTYPES = ("bfloat16", "float32", "float16")
SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: the static network, its parameters by Hugging Face's tensor names, and its card."""

    network: Network
    params: dict[str, Leaf]
    card: Card
    folder: pathlib.Path  # or the GGUF file
    recipe: Recipe | None = None  # how the weights were quantized
    drafts: tuple[Recipe, ...] = ()  # of the twins of these very weights that the folder, a converted checkpoint, holds

    @property
    def tokenizer(self):
        return self.card.tokenizer

    @property
    def embedding(self) -> jax.Array:
        """The input embedding, which is of the model's dtype, on its device, and never quantized."""
        return cast(jax.Array, self.params[EMBEDDING])

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in self.params.values())

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.params.values())

    @jax_settings.held
    def quantized(
        self,
        format: str = "mxfp4",
        policy: Policy | None = None,
        scale_rule: str = "floor",
        *,
        bits: float | None = None,
        calibrate: bool = False,
    ) -> "Model":
        """Return the twin: this model with its linear layers and lm_head in `format`, sharing every other array.

        A model that was quantized in this very way is its own twin. Leaves that the converted checkpoint holds are not made again.

        Args:
          format: a name of `formats.FORMATS`, such as mxfp4, nvfp4, int4 or int8.
          policy: exceptions, from a glob over tensor names to a format or None (not quantized); the first match decides. None is
            `quantization.default_policy`: on CPU, a tied head of an MXFP4 twin is cast to MXFP8 (e4m3). {} makes no
            exceptions.
          scale_rule: floor, mse (of a few scales the one of least squared error), or, of MX formats, ceil, rceil or even
            (`cast.quantize`).
          bits: in place of these three: a format for each weight, so that they take so many bits a weight on average, and the
            twin's probabilities move least from the model's. What each weight costs in each format is measured, once, on text that
            the model writes (`precision_search`).
          calibrate: round each weight so that its columns make up for each other's errors, by what it multiplies in text that the
            model writes (`weights.calibration`): better drafts of the same bytes. It takes its time once, and goes on where it was
            if interrupted.

        Raises:
          InputError: an unknown format, rule or glob, too few bits, bits beside the others, or a model that is quantized in another
            way.
        """
        arguments.recipe(format, policy, scale_rule)
        arguments.flag("calibrate", calibrate)
        if bits is not None:
            return self._of_bits(format, policy, scale_rule, bits, calibrate)
        recipe = self._recipe(format, policy, scale_rule, calibrate)
        if recipe == self.recipe:
            return self
        if self.recipe is not None:
            raise InputError(
                f"{self.card.name} is quantized already (format {self.recipe.format}, scale rule {self.recipe.scale_rule}, "
                f"policy {dict(self.recipe.policy)}{', calibrated' * self.recipe.calibrated}); quantize the original model instead"
            )
        dtype = self.embedding.dtype
        if recipe in self.drafts:
            params = self.params | checkpoint.restore_draft(self.folder, self.network, recipe, dtype)
        else:
            params = self._made(recipe, dtype)
        card = dataclasses.replace(self.card, name=f"{self.card.name}@{recipe.name}")
        return dataclasses.replace(self, params=params, card=card, recipe=recipe)

    def _made(self, recipe: Recipe, dtype: jnp.dtype | None = None) -> dict[str, Leaf]:
        """The parameters of a twin, for activations of `dtype`, or None as they are stored."""
        arrays = cast(dict[str, jax.Array], self.params)  # as without a recipe
        tensors, (format, policy, scale_rule) = self.network.tensors(), (recipe.format, dict(recipe.policy), recipe.scale_rule)
        rounded = {}
        if recipe.calibrated:
            check_scale_rule(scale_rule, format)
            wanted = formats_of(tensors, format, policy)
            rounded = calibrated_weights(self.network, arrays, self._first, wanted, scale_rule)
        return quantize_params(arrays, tensors, format, policy, scale_rule, self.network.mesh, dtype, rounded)

    def sensitivity(self) -> precision_search.Costs:
        """Return, by weight and format, how far casting the one to the other moves the model's probabilities, in nats a token.

        Raises:
          InputError: the model is quantized.
        """
        if self.recipe is not None:
            raise InputError(f"{self.card.name} is quantized already; ask the original model")
        return precision_search.sensitivity(self.network, cast(dict[str, jax.Array], self.params), self._first)

    @property
    def _first(self) -> int:
        """The token with which its texts begin."""
        begins = getattr(self.tokenizer, "bos_token_id", None)
        return begins if begins is not None else (*self.card.eos_token_ids, 0)[0]

    def _of_bits(self, format, policy, scale_rule, bits, calibrate):
        if (format, policy, scale_rule) != ("mxfp4", None, "floor"):
            raise InputError("bits finds the formats by itself; leave format, policy and scale_rule out")
        bits = arguments.number("bits", bits)
        if self.recipe is not None:
            raise InputError(f"{self.card.name} is quantized already; quantize the original model instead")
        params = cast(dict[str, jax.Array], self.params)
        found = precision_search.policy_for(self.network, params, self._first, bits)
        twin = self.quantized(format, found, precision_search.SCALE_RULE, calibrate=calibrate)
        name = f"{self.card.name}@auto{bits:g}{CALIBRATED * calibrate}"
        return dataclasses.replace(twin, card=dataclasses.replace(twin.card, name=name))

    def _recipe(self, format: str, policy: Policy | None = None, scale_rule: str = "floor", calibrate: bool = False) -> Recipe:
        if policy is None:
            platform = next(iter(self.embedding.devices())).platform
            policy = default_policy(format, self.network.config.tied, platform)
        return Recipe(format, tuple(policy.items()), scale_rule, calibrate)


@jax_settings.held
def load(
    model: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    twin_of: Model | None = None,
    dequantize: bool = False,
) -> Model:
    """Load a model from the demo family, a folder, a GGUF file, or the Hugging Face hub.

    Weights that somebody quantized (compressed-tensors, GPTQ, AWQ, AutoRound, FP8, ModelOpt, Quark, the types of a GGUF file) draft
    as they are stored for the model that they were made from, or are decoded to be a model: of a GGUF file without being asked, and
    a warning says from which types. Stderr tells whether such a draft shares a cache.

    Args:
      model: `demo`, `demo-small`, a folder (Hugging Face's layout, or one that `convert` wrote), a .gguf file (of a split model any
        of its files), or an owner/name id or owner/name/FILE.gguf of the hub.
      dtype: of weights and activations: bfloat16, float32 or float16.
      mesh: a device mesh with an axis named `model` to split the weights over (tensor parallelism); None is one device.
      twin_of: for quantized weights, the model that they are to draft for, whose dtype and mesh they take. Of the same network they
        must be its own weights, and are its twin, which shares its embedding and cache, where keys and values allow it.
      dequantize: decode quantized weights to `dtype`.

    Raises:
      InputError: one sentence on what is wrong with the name, the config or the weights.
    """
    arguments.choice("dtype", dtype, DTYPES)
    if mesh is not None:
        arguments.instance("mesh", mesh, Mesh, "a Mesh, such as jax.make_mesh((4,), ('model',)), or None")
    arguments.flag("dequantize", dequantize)
    if twin_of is not None:
        _check_original(twin_of, dequantize)
        dtype, mesh = twin_of.embedding.dtype.name, twin_of.network.mesh
    mesh = usable_mesh(mesh)
    folder = find(model)
    enable_compilation_cache()
    found = origin(folder)
    _check_use(folder, found.quantization, wanted=twin_of is not None or dequantize)
    config, tokenizer = found.config, found.tokenizer(None if twin_of is None else twin_of.tokenizer)
    card = Card(
        name=str(model),
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        tokenizer=tokenizer,
        eos_token_ids=found.eos_token_ids,
        chat_end_token_ids=tuple(i for i in chat.end_token_ids(tokenizer) if i < config.vocab_size),
    )
    if twin_of is not None:
        return _load_packed(folder, found, Network(config, mesh), card, twin_of)
    params: dict[str, Leaf] = {**found.params(Network(config, mesh), jnp.dtype(dtype), mesh)}
    if found.quantization is not None and folder.is_dir():
        console.say(f"{card.name}: weights of {found.quantization.method} decoded to {dtype}, not the original's")
    # What the files hold decides whether the embedding is the head too.
    network = Network(dataclasses.replace(config, tied=HEAD not in params), mesh)
    drafts = checkpoint.drafts(folder, dtype) if checkpoint.is_converted(folder) else ()
    return Model(network, params, card, folder, drafts=drafts)


def is_quantized(model: str | os.PathLike) -> bool:
    """Return whether a model's weights are quantized already; one of the hub is downloaded."""
    place = find(model)
    return reader.read(place).is_quantized if place.is_file() else find_quantization(place) is not None


def _load_packed(place: pathlib.Path, found: Origin, network: Network, card: Card, twin_of: Model) -> Model:
    assert found.quantization is not None  # else it would have been refused
    assert found.leaves is not None
    draft = packed(place, found.leaves(network), network, twin_of.network, cast(dict[str, jax.Array], twin_of.params))
    method = found.quantization.method
    formats = f"{card.name}: weights of {method} ({', '.join(draft.formats) or 'floats'})"
    if draft.own_cache is None:
        console.say(f"{formats} as the twin of {twin_of.card.name}, whose embedding and cache they share")
    else:
        console.say(f"{formats} with a cache of their own beside {twin_of.card.name}: {draft.own_cache}")
    return Model(draft.network, draft.params, card, place, recipe=Recipe(method))


def _check_original(twin_of: Any, dequantize: bool) -> None:
    arguments.instance("twin_of", twin_of, Model, "a Model, as mlsd.load returns it, or None")
    if dequantize:
        raise InputError("twin_of drafts with weights as they are stored, and dequantize=True decodes them; give one of the two")
    if twin_of.recipe is not None:
        raise InputError(f"twin_of is {twin_of.card.name}, which is quantized itself; give the original model")


def _check_use(folder: pathlib.Path, quantization: Quantization | None, wanted: bool) -> None:
    if quantization is None and wanted:
        raise InputError(f"{folder} says nothing of quantized weights; leave twin_of and dequantize out")
    if quantization is not None and not wanted and folder.is_dir():
        raise InputError(
            f"{quantization.file}: the weights are quantized already ({arguments.brief(quantization.method)}); give the original "
            "BF16, FP16 or FP32 checkpoint, for which these can draft (twin_of=target, --draft FOLDER), or decode them "
            "(dequantize=True, --dequantize)"
        )


def describe(model: str | os.PathLike) -> dict[str, Any]:
    """Return what a model is, from its small files or a GGUF file's header: family, size, positions, tokenizer, sampling defaults.

    The sampling defaults of generation_config.json are shown, not applied: `generate` does what its arguments say.
    """
    found = origin(find(model))
    config = found.config
    size, attention = parameters(Network(config).tensors()), config.layers[0].mixer
    defaults = {key: found.recorded[key] for key in SAMPLING_KEYS if key in found.recorded}
    return {
        "model": f"{model} ({found.kind})",
        "family": found.family,
        "parameters": f"{size:,}",
        **found.facts,
        "bytes in bfloat16": f"{2 * size:,}",
        "positions": config.max_positions,
        "vocabulary": config.vocab_size,
        "layers": f"{len(config.layers)} x hidden {config.hidden_size}, {attention.heads} heads, "
        f"{attention.kv_heads} key/value heads",
        "tokenizer": found.tokenizer_kind,
        "end of text ids": ", ".join(map(str, found.eos_token_ids)) or "none",
        "recorded sampling": f"{json.dumps(defaults)} (not applied)" if defaults else "none",
    }


@jax_settings.held
def convert(
    model: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    draft: str | None = None,
    calibrate: bool = False,
) -> pathlib.Path:
    """Write a model as an orbax checkpoint that `load` reads much faster than it imports the original.

    Args:
      model: as for `load`.
      folder: a new name.
      dtype: as for `load`; the weights are stored in it.
      draft: a format, such as mxfp4, in which the twin's quantized weights are stored too, for `Model.quantized` to find.
      calibrate: store the calibrated twin, which `Model.quantized(format, calibrate=True)` finds, and no other.

    Raises:
      InputError: as for `load`, the format is unknown, or the folder exists already or cannot be written.
    """
    if draft is not None:
        check_format(arguments.instance("draft", draft, str, f"one of {', '.join(FORMATS)}, or None"))
    if arguments.flag("calibrate", calibrate) and draft is None:
        raise InputError("calibrate is for the weights of a draft, and there is none; give draft (--draft) a format, such as mxfp4")
    if not is_path(folder) or not os.fspath(folder):
        raise InputError(f"folder is {arguments.brief(folder)}, but must be the name of a new folder")
    folder = pathlib.Path(folder)
    checkpoint.check_new(folder)
    loaded = load(model, dtype=dtype)
    twins = {}
    if draft is not None:
        recipe = loaded._recipe(draft, calibrate=calibrate)
        twins[recipe] = loaded._made(recipe)
    checkpoint.save(folder, loaded.folder, loaded.params, twins)
    return folder


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless jax was told where to keep them (or not to)."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
