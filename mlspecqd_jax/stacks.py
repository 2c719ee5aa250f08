"""`stack`: a target and its drafters, outermost first, checked against each other and built into one `Stack`."""

import itertools
import math
import statistics
from typing import Any, NamedTuple

from jax.sharding import NamedSharding, PartitionSpec

from mlspecqd_jax import console, jax_settings
from mlspecqd_jax.arguments import brief, choice, flag, instance
from mlspecqd_jax.errors import InputError
from mlspecqd_jax.loading.model import Model
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.pass_times import ASKING, ROWS, guessed
from mlspecqd_jax.planner import default_drafts
from mlspecqd_jax.plans import Plan, kept, key_of
from mlspecqd_jax.speculation.autopilot import RATE, Autopilot
from mlspecqd_jax.speculation.drafters.either import Either
from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup
from mlspecqd_jax.speculation.level import Level, reach
from mlspecqd_jax.speculation.priors import prior
from mlspecqd_jax.speculation.protocols import Scorer
from mlspecqd_jax.speculation.stack import Stack
from mlspecqd_jax.speculation.translated import Dictionary, Translated, TranslatedParams
from mlspecqd_jax.text.card import first_difference
from mlspecqd_jax.text.token_map import TokenMap, token_map
from mlspecqd_jax.weights.placement import place
from mlspecqd_jax.weights.quantization import bits_of
from pallas_kernels.product import ONE_WIDTH

LENGTHS = ("fixed", "auto")


@jax_settings.held
def stack(target: Model, *drafters: Any, exact: bool = True, share_cache: bool = True, lengths: str | Plan = "fixed") -> Stack:
    """Build what generates: a target, what drafts for it, what drafts for that, and so on; the target alone decodes plainly.

    Args:
      target: the model whose output is wanted.
      *drafters: outermost first, each (drafter, draft_len) or a drafter alone (5 tokens, 3 if it drafts for a draft, 4 for prompt
        look-up). A drafter is a `Model`, such as the level's own twin `target.quantized()`, or `prompt_lookup()`, which must be
        the last; a model of another tokenizer drafts what its tokens and the target's have in common, and stderr says how much.
        "auto" alone is what `plan` chose for the target on this machine, or else what was found to pay for models of its size on
        its device, with lengths="auto".
      exact: pad every window of the target to a multiple of rows at which a row's result does not depend on the window, so that
        all stacks give the same tokens in the weights' dtype (CPU: 2 rows, or none where the C++ products run; GPU and TPU: 16,
        hence draft_len <= 15). False drops the padding: fastest, and equal up to rounding.
      share_cache: let twins read and write their verifier's cache; False gives each a cache of its own.
      lengths: "fixed" drafts so many tokens in each round; "auto" as many as pay, from none up to the draft_len (15 where none is
        given, 7 if it drafts for a draft), by a model or by look-up, which such a stack has anyway, and takes no more than about
        two per cent longer than plain decoding whatever is accepted. A `Plan` is "auto" by that plan's times, whatever is kept.

    Raises:
      InputError: a drafter does not fit the level above it; one sentence on how.
    """
    instance("target", target, Model, "a Model, as mlsd.load returns it")
    exact, share_cache = flag("exact", exact), flag("share_cache", share_cache)
    plan = lengths if isinstance(lengths, Plan) else None
    auto = plan is not None or choice("lengths", lengths, LENGTHS) == "auto"
    if drafters == ("auto",):
        names = default_drafts(target) if plan is None else _chosen_by(plan)
        drafters, auto = tuple(PromptLookup() if name == "ngram" else twin(target, name) for name in names), bool(names)
    pairs = [_pair(drafter, nested=i > 0, auto=auto) for i, drafter in enumerate(drafters)]
    if auto:
        pairs = _with_lookup(pairs)
    rows = exact_rows(target, pairs[0][1] if pairs else 0) if exact else 1
    models, scorers = [target], [_Scorer(target.network, target.params)]
    translations: dict[Any, _Translation] = {}
    for i, (drafter, _) in enumerate(pairs):
        if isinstance(drafter, Model):
            _check_fits(drafter, target)
            models.append(drafter)
            scorers.append(_scorer(drafter, target, translations))
        elif i + 1 < len(pairs):
            raise InputError(f"{name_of(drafter)} has no weights that {name_of(pairs[i + 1][0])} could draft for; put it last")
    innermost = None if not pairs or isinstance(pairs[-1][0], Model) else pairs[-1][0]
    lookup = innermost if auto and isinstance(innermost, PromptLookup) else None
    if auto and len(models) > 2:  # a draft of a draft's draft costs next to nothing
        innermost, pairs = None, pairs[:-1]
    draft_lens = [draft_len for _, draft_len in pairs] + [0] * (len(models) > len(pairs))
    scorers = [scorer.reaching(reach(draft_lens, len(models)), outermost=i == 0) for i, scorer in enumerate(scorers)]

    def level(i: int) -> Level:
        model, last = models[i], i + 1 == len(models)
        drafter = innermost if last else level(i + 1)
        if lookup is not None and not last:
            drafter = Either(drafter, lookup)
        multiple = 1 if i else rows
        narrower = model.network.narrower(model.params, draft_lens[i] + 1) if isinstance(scorers[i].model, Network) else ()
        return Level(
            *scorers[i],
            drafter,
            draft_lens[i],
            window_multiple=multiple,
            widths=tuple(width for width in narrower if width % multiple == 0),
            share_cache=share_cache and i > 0 and is_twin(model, models[i - 1]),
        )

    outermost = level(0)
    control = _autopilot(models, outermost, plan) if auto else None
    return Stack(outermost, tuple(model.card for model in models), exact, control)


def prompt_lookup(max_ngram: int = 3, min_ngram: int = 1) -> PromptLookup:
    """Return the drafter that proposes what followed the last tokens where they occurred before (n-grams of prompt and output)."""
    return PromptLookup(max_ngram, min_ngram)


def twin(model: Model, name: str, calibrate: bool = False) -> Model:
    """Return a model's twin in a format, or in one for each weight (auto4.5)."""
    bits = bits_of(name)
    return model.quantized(name, calibrate=calibrate) if bits is None else model.quantized(bits=bits, calibrate=calibrate)


def exact_rows(target: Model, draft_len: int) -> int:
    """Return how many rows every window of the target is a multiple of, so that all stacks compute a row alike.

    Raises:
      InputError: a window of draft_len + 1 would be wider than plain decoding's, where that is not known to be alike, or no
        width at which a row is known to be.
    """
    rows = target.network.row_multiple(target.params)
    if rows >= ONE_WIDTH and draft_len >= rows:
        raise InputError(
            f"draft_len {draft_len} is more than the {rows - 1} that exact=True allows on GPU and TPU; pass exact=False"
        )
    return rows


def is_twin(model: Model, other: Model) -> bool:
    """Return whether two models are one up to quantization: the same network around the very same embedding."""
    return model.network == other.network and model.embedding is other.embedding


def name_of(drafter: Any) -> str:
    """Return what reports and messages call a drafter."""
    return drafter.card.name if isinstance(drafter, Model) else getattr(drafter, "name", type(drafter).__name__)


def default_draft_len(drafter: Any, nested: bool, auto: bool = False) -> int:
    """Return the draft_len of a drafter that is given without one, or the most where lengths are chosen as they pay."""
    if auto:
        return 7 if nested else 15
    return 4 if isinstance(drafter, PromptLookup) else 3 if nested else 5


def check_draft_len(draft_len: Any) -> int:
    """Return a draft_len that is a whole number of at least 1, or raise an InputError."""
    if not isinstance(draft_len, int) or isinstance(draft_len, bool) or draft_len < 1:
        raise InputError(
            f"draft_len is {brief(draft_len)}, but must be a whole number of at least 1; leave the drafter out to decode plainly"
        )
    return draft_len


def _pair(given: Any, nested: bool, auto: bool) -> tuple[Any, int]:
    drafter, *rest = given if isinstance(given, (tuple, list)) and given else (given,)
    drafts = hasattr(drafter, "init") and hasattr(drafter, "propose") and not isinstance(drafter, type)
    if not isinstance(drafter, Model) and not drafts:
        raise InputError(
            f"a drafter is {brief(drafter)}, but must be a Model, prompt_lookup(), or a pair of one of them and its draft_len"
        )
    if len(rest) > 1:
        raise InputError(f"{name_of(drafter)} comes with {len(rest)} values, but needs one, its draft_len")
    return drafter, check_draft_len(rest[0]) if rest else default_draft_len(drafter, nested, auto)


def _chosen_by(plan: Plan) -> tuple[str, ...]:
    if not plan.tried:
        raise InputError(f'the plan of {", ".join(plan.names)} chose no drafts; name those that it is of in place of "auto"')
    return plan.drafts


def _with_lookup(pairs: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Return the same with look-up at the end, where there is none; no other drafter without a model can be guided."""
    other = next((drafter for drafter, _ in pairs if not isinstance(drafter, (Model, PromptLookup))), None)
    if other is not None:
        raise InputError(f'lengths="auto" is for models and prompt_lookup(), not for {name_of(other)}; pass lengths="fixed"')
    if pairs and isinstance(pairs[-1][0], PromptLookup):
        return pairs
    lookup = PromptLookup()
    return [*pairs, (lookup, default_draft_len(lookup, nested=bool(pairs), auto=True))]


def _autopilot(models: list[Model], level: Level, plan: Plan | None) -> Autopilot:
    """Return what controls the lengths: by times that were measured and kept (`plans`), or that bytes let guess."""
    twins = [is_twin(draft, verifier) for verifier, draft in itertools.pairwise(models)]
    plan = kept(key_of(level)) if plan is None else plan
    if plan is None:
        times, asking, plain = guessed([model.bytes_read(ROWS) for model in models], models[0].runs_on), ASKING, math.nan
    elif len(plan.times) != len(models):
        raise InputError(f"the plan is of {len(plan.times)} levels, {', '.join(plan.names)}, but the stack has {len(models)}")
    else:
        times, asking, plain = plan.times, plan.asking, plan.plain
    known = prior([*twins, False], None if plan is None else plan.seen)
    rate = statistics.geometric_mean(plan.speedups.values()) if plan is not None and plan.speedups else RATE
    return Autopilot.create(times, known, len(level.draft_lens), rate=rate, asking=asking, plain=plain)


def _check_fits(draft: Model, target: Model) -> None:
    ours, theirs = draft.embedding, target.embedding
    if ours.dtype != theirs.dtype:
        raise InputError(
            f"{draft.card.name} is in {ours.dtype.name} and {target.card.name} in {theirs.dtype.name}; load both in one dtype"
        )
    if draft.network.mesh != target.network.mesh or ours.devices() != theirs.devices():
        raise InputError(
            f"{draft.card.name} and {target.card.name} are on different meshes or devices; load both with the same mesh"
        )


class _Scorer(NamedTuple):
    model: Scorer
    params: Any

    def reaching(self, positions: int, outermost: bool) -> "_Scorer":
        return self._replace(model=self.model.reaching(positions, outermost)) if isinstance(self.model, Network) else self


class _Translation(NamedTuple):
    dictionary: Dictionary
    stretch: float


def _scorer(draft: Model, target: Model, translations: dict[Any, _Translation]) -> _Scorer:
    """Return what scores the target's tokens by a draft: its network, or a translation, kept for the tokenizer's other models."""
    difference = first_difference(draft.card, target.card)
    if difference is None:
        return _Scorer(draft.network, draft.params)
    if draft.card.tokenizer not in translations:
        try:
            found = token_map(target.card, draft.card)
        except InputError as error:
            token, of_draft, of_target = difference
            raise InputError(
                f"the tokenizers of {draft.card.name} and {target.card.name} differ: token {token} is {of_draft!r} in the one and "
                f"{of_target!r} in the other; and {error}; draft with a model of the target's tokenizer"
            ) from error
        if draft.network.reach is not None:
            raise InputError(
                f"{draft.card.name} has layers that do not keep all positions and another tokenizer than {target.card.name}, which "
                "is not supported; draft with a model of the target's tokenizer, or one of attention alone"
            )
        console.say(
            f"{draft.card.name}: a draft of another tokenizer; {found.shared:,} of its {found.tokens:,} tokens are tokens of "
            f"{target.card.name}"
        )
        translations[draft.card.tokenizer] = _placed(found, draft)
    dictionary, stretch = translations[draft.card.tokenizer]
    scorer = Translated(draft.network, target.network.vocab_size, stretch, draft.card.max_positions)
    return _Scorer(scorer, TranslatedParams(draft.params, dictionary))


def _placed(found: TokenMap, draft: Model) -> _Translation:
    """Put a token map where a draft is, and count with a few more of its tokens than spell one of the target on average."""
    mesh = draft.network.mesh
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    arrays = (found.first, found.ids, found.counterpart, found.opening)
    return _Translation(Dictionary(*(place(array, everywhere) for array in arrays)), math.ceil(4 * found.stretch) / 4)
