"""Counts of sampled sequences, and the test of them against exact probabilities."""

import numpy as np
from scipy import stats


def g_test(observed, expected):
    """Return the p-value of counts [n] against probabilities [n] (likelihood ratio, rare cells pooled)."""
    observed, expected = np.asarray(observed, float).ravel(), np.asarray(expected, float).ravel()
    expected = expected / expected.sum() * observed.sum()
    if np.any(observed[expected < 1e-9] > 0):
        return 0.0
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    seen = observed > 0
    g = 2 * np.sum(observed[seen] * np.log(observed[seen] / expected[seen]))
    return float(stats.chi2.sf(g, np.sum(expected > 0) - 1))


def count_sequences(sequences, vocab_size):
    """Count rows [N, n] of tokens as an array [V**n]."""
    sequences = np.asarray(sequences)
    index = np.ravel_multi_index(tuple(sequences.T), (vocab_size,) * sequences.shape[1])
    return np.bincount(index, minlength=vocab_size ** sequences.shape[1])
