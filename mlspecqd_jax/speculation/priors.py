"""Chances of acceptance before anything was seen: what drafts of a kind were found to be worth by class.

A twin errs by noise on its logits, so that a token whose logit was ahead by m stays the target's choice with chance
Phi(m / (s sqrt 2)), s being the size of that noise: 0.5 to 1 for twins in four bits, about 2 for models that were trained apart.
"""

import math

import numpy as np

from mlspecqd_jax.speculation.guide import CLASSES

MIDDLES = (0.06, 0.19, 0.38, 0.75, 1.5, 3.0, 6.0, 12.0)  # of the leads of each class
TWIN, APART = 0.8, 2.0  # s
MATCHED = (0.25, 0.45, 0.65, 0.8, 0.8, 0.85, 0.9, 0.95)  # chance of look-up's tokens, by how many matched before
WEIGHT = 4.0  # tokens that a table counts for
MOST_SEEN = 4.0  # tokens that what was seen of a class counts for besides


def prior(twins: list[bool], seen: np.ndarray | None = None) -> np.ndarray:
    """Return accepted and judged by level, source and class, f64 [L, 2, CLASSES, 2].

    Args:
      twins: for each level, whether what drafts for it is its twin.
      seen: the same of earlier texts, or None.
    """
    tables = [[MATCHED, _of_leads(TWIN if twin else APART)] for twin in twins]
    chance = np.array(tables)
    known = np.stack([chance, np.ones_like(chance)], axis=-1) * (WEIGHT / CLASSES)
    if seen is None:
        return known
    return known + seen * np.minimum(1, MOST_SEEN / np.maximum(seen[..., 1:], 1))


def _of_leads(s: float) -> list[float]:
    return [0.5 + 0.5 * math.erf(lead / (2 * s)) for lead in MIDDLES]
