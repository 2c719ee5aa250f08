"""Which drafts a model gets that is given none: those that a plan chose, or were found to pay for its size on a kind of device.

A draft pays where a pass over it costs less than the passes over the target that it saves. Look-up costs next to nothing, but the
windows that judge it cost what they cost; a twin reads a third of the target's bytes, which is a gain only where reading them is
what takes the time. `python benchmarks/decode.py` and `benchmarks/accelerator.py` measure both, and the tables of
`benchmarks/README.md` hold what they found.
"""

from typing import NamedTuple

from mlspecqd_jax.loading.model import Model
from mlspecqd_jax.plans import kept, key_of
from mlspecqd_jax.speculation.level import Level


class Row(NamedTuple):
    """On devices of a kind, targets of at least so many bytes are drafted so, as `--draft` takes it; and why."""

    device: str  # cpu (with the C++ products), cpu-xla (without), gpu, tpu
    least_bytes: int
    drafts: tuple[str, ...]
    why: str


LOOKUP = ("ngram",)
# Twins that a plan tries: with products that read no more than the stored bytes, from few bits to many.
TWINS = {"cpu": ("mxfp4", "auto4.5", "mxfp6_e2m3", "int8"), "gpu": ("mxfp4",), "tpu": ("mxfp4",)}

# The first row that fits decides.
TABLE = (
    Row("cpu", 10**9, ("mxfp4",), "1.1B parameters: a pass of the twin takes 0.34 of the target's, 1.55 x plain decoding at 0.9"),
    Row(
        "cpu",
        0,
        LOOKUP,
        "greedy, look-up makes 1.87 x plain decoding of the demo and 1.36 x of SmolLM2-135M; the twin, 1.45 x of the latter, needs "
        "weights and a start of its own; a plan tells which it is",
    ),
    Row("cpu-xla", 0, LOOKUP, "XLA decodes the twin's weights in every pass, which takes longer than the target's own product"),
    Row(
        "gpu",
        0,
        LOOKUP,
        "H200: SmolLM2-135M 1.45 x plain decoding, at T = 0.8 1.20 x; the twin 0.50 x, at 8B parameters 1.03 x at 0.9",
    ),
    Row(
        "tpu", 0, LOOKUP, "windows are padded to 16 rows, so that one with look-up's 4 is as wide as plain decoding's; not measured"
    ),
)


def default_drafts(target: Model) -> tuple[str, ...]:
    """Return what drafts for a model unless something is asked for, as `--draft` takes it: as many tokens as pay; () is nothing."""
    plan = kept(choice_key(target))
    return drafts_for(target.runs_on, target.nbytes) if plan is None else plan.drafts


def choice_key(target: Model) -> str:
    """Return the name under which the plan that chose a model's drafts is kept."""
    return key_of(Level(target.network, target.params))


def twins_for(device: str) -> tuple[str, ...]:
    """Return the twins that a plan tries on a kind of device."""
    return TWINS.get(device, ())


def drafts_for(device: str, nbytes: int) -> tuple[str, ...]:
    """Return the drafts of the first row of the table for a kind of device and a target's bytes."""
    return next(row.drafts for row in TABLE if row.device == device and nbytes >= row.least_bytes)
