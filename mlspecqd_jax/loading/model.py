"""`Model`: a loaded model, and the twins that it makes of itself."""

import dataclasses
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import cpu_kernels
from mlspecqd_jax import arguments, jax_settings
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading import checkpoint, precision_search
from mlspecqd_jax.loading.calibrating import calibrated_weights
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.text.card import Card
from mlspecqd_jax.text.fast_tokenizer import FastTokenizer
from mlspecqd_jax.weights.cast import check_scale_rule
from mlspecqd_jax.weights.quantization import (
    Policy,
    Recipe,
    bits_of,
    default_policy,
    formats_of,
    quantize_params,
    recipe_of_bits,
)
from mlspecqd_jax.weights.quantized_array import Leaf, QuantizedArray
from mlspecqd_jax.weights.tensors import EMBEDDING, HEAD


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
        """Transformers' tokenizer of the model, or None."""
        return self.card.tokenizer.whole if isinstance(self.card.tokenizer, FastTokenizer) else self.card.tokenizer

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

    def bytes_read(self, rows: int | np.ndarray = 1) -> Any:
        """Return what a pass over so many rows reads of the weights: all but tables, of which it reads some rows.

        Of experts it is those that rows hit which choose by chance (`Network.parts_read`).
        """
        part = self.network.parts_read(rows) | ({EMBEDDING: 0.0} if HEAD in self.params else {})
        return sum(leaf.nbytes * part.get(name, 1.0) for name, leaf in self.params.items())

    @property
    def holds_packed_weights(self) -> bool:
        """Whether some weights are quantized by the model's maker (`native_mxfp4`), or by its recipe."""
        return any(isinstance(leaf, QuantizedArray) for leaf in self.params.values())

    @property
    def runs_on(self) -> str:
        """What runs its products: cpu (C++), cpu-xla (XLA on a CPU), gpu or tpu."""
        platform = next(iter(self.embedding.devices())).platform
        if platform != "cpu":
            return "tpu" if platform == "tpu" else "gpu"
        in_cpp = self.embedding.dtype == jnp.bfloat16 and self.network.mesh is None and cpu_kernels.usable()
        return "cpu" if in_cpp else "cpu-xla"

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
        return self._twin(recipe)

    def _twin(self, recipe: Recipe) -> "Model":
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
            self._need_plain_weights("calibrated")
            check_scale_rule(scale_rule, format)
            wanted = formats_of(tensors, format, policy)
            rounded = calibrated_weights(self.network, arrays, self.first_token, wanted, scale_rule)
        return quantize_params(arrays, tensors, format, policy, scale_rule, self.network.mesh, dtype, rounded)

    def sensitivity(self) -> precision_search.Costs:
        """Return, by weight and format, how far casting the one to the other moves the model's probabilities, in nats a token.

        Raises:
          InputError: the model is quantized.
        """
        if self.recipe is not None:
            raise InputError(f"{self.card.name} is quantized already; ask the original model")
        self._need_plain_weights("measured")
        return precision_search.sensitivity(self.network, cast(dict[str, jax.Array], self.params), self.first_token)

    def _need_plain_weights(self, done: str) -> None:
        if self.holds_packed_weights:
            raise InputError(f"{self.card.name} holds weights in MXFP4 already, by which none is {done}; give a format alone")

    @property
    def first_token(self) -> int:
        """The token with which its texts begin."""
        begins = getattr(self.card.tokenizer, "bos_token_id", None)
        return begins if begins is not None else (*self.card.eos_token_ids, 0)[0]

    def _of_bits(self, format, policy, scale_rule, bits, calibrate):
        if (format, policy, scale_rule) != ("mxfp4", None, "floor"):
            raise InputError("bits finds the formats by itself; leave format, policy and scale_rule out")
        bits = arguments.number("bits", bits)
        if self.recipe is not None:
            raise InputError(f"{self.card.name} is quantized already; quantize the original model instead")
        return self._twin(self._recipe_of_bits(bits, calibrate))

    def _recipe_of_bits(self, bits: float, calibrate: bool) -> Recipe:
        """How a twin of so many bits is made: as the folder's, or found."""
        stored = [recipe for recipe in self.drafts if (recipe.bits, recipe.calibrated) == (bits, calibrate)]
        if stored:
            return stored[0]
        self._need_plain_weights("measured")
        params = cast(dict[str, jax.Array], self.params)
        return recipe_of_bits(precision_search.policy_for(self.network, params, self.first_token, bits), bits, calibrate)

    def _recipe(self, format: str, policy: Policy | None = None, scale_rule: str = "floor", calibrate: bool = False) -> Recipe:
        if policy is None:
            platform = next(iter(self.embedding.devices())).platform
            policy = default_policy(format, self.network.config.tied, platform)
        return Recipe(format, tuple(policy.items()), scale_rule, calibrate)


def stored_twin(model: Model, format: str, calibrate: bool) -> tuple[Recipe, dict[str, Leaf]]:
    """Return how a model's twin in a format, or of bits (auto4.5), is made, and its parameters as they are stored."""
    bits = bits_of(format)
    recipe = model._recipe(format, calibrate=calibrate) if bits is None else model._recipe_of_bits(bits, calibrate)
    return recipe, model._made(recipe)
