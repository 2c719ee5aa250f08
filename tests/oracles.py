"""Plain-Python oracles: filters, penalties, choices, decoding and prompt lookup, by sorting and by loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from toys import quick_jit

from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.choosing import DRAW, RESIDUAL, gumbel, noise
from mlspecqd_jax.speculation.settings import Sampling


def filtered_oracle(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Filter f32 logits [V] by sorting; return (logits f32 with -inf, whether rounding may decide what is kept)."""
    x = np.asarray(logits, np.float32) / np.float32(temperature or 1)
    doubtful = False
    if top_k:
        x = np.where(x < np.sort(x)[-min(top_k, len(x))], -np.inf, x)
    if top_p < 1:
        order = np.argsort(x, kind="stable")
        mass = np.cumsum(softmax(x)[order])
        spare = 1 - float(np.float32(top_p))
        dropped = order[:-1][mass[:-1] <= spare]
        doubtful |= bool(np.any(np.abs(mass[:-1] - spare) < 1e-6))
        x[dropped] = -np.inf
    if min_p:
        p = softmax(x)
        threshold = float(np.float32(min_p)) * p.max()
        doubtful |= bool(np.any((np.abs(p - threshold) < 1e-6 * threshold) & (p < p.max())))
        x = np.where(p < threshold, -np.inf, x)
    return x.astype(np.float32), doubtful


def adjust_oracle(logits, tokens, prompt_length, repetition, presence, frequency, bias=()):
    """Adjust logits [V] after a list of tokens by walking over them."""
    x = np.asarray(logits, np.float64)
    for v, value in dict(bias).items():
        x[v] += value
    for v in set(tokens):
        x[v] = x[v] * repetition if x[v] < 0 else x[v] / repetition
    for v in set(tokens[prompt_length:]):
        x[v] -= presence
    for v in tokens[prompt_length:]:
        x[v] -= frequency
    return x


def softmax(x):
    """Return softmax of [V] in float64."""
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max())
    return e / e.sum()


@functools.partial(quick_jit, static_argnums=(1, 2, 3))
def _gumbel_of_rows(seeds, size, vocab_size, purpose):
    t = jnp.broadcast_to(jnp.arange(size), (len(seeds), size))
    return gumbel(noise(seeds, t, 0, purpose), vocab_size)


def perturbation_of(sampling: Sampling, size):
    """Return the package's noise for plain decoding, [B, size, V], by index of the token that it draws."""
    if sampling.rule == "coupled":
        return np.asarray(_gumbel_of_rows(sampling.seed, size, sampling.vocab_size, DRAW))
    # Under rejection each round has noise of its own, and a round of plain decoding draws the token at which it begins.
    seeds = jax.vmap(lambda t: sampling.of_round(jnp.full_like(sampling.seed, t, jnp.int32)).seed)(jnp.arange(size))
    of_rounds = jax.vmap(lambda seeds: _gumbel_of_rows(seeds, size, sampling.vocab_size, RESIDUAL))(seeds)  # [size, B, size, V]
    return np.asarray(jnp.diagonal(of_rounds, axis1=0, axis2=2).transpose(0, 2, 1))


def choice_oracle(logits, row, prompt_length, settings, r, perturbation):
    """Choose what follows a list of tokens from logits [V]: row r of a numpy `Sampling`, with its noise [size, V]."""
    s = settings
    bias = () if s.logit_bias is None else enumerate(s.logit_bias[r])
    penalties = s.repetition_penalty[r], s.presence_penalty[r], s.frequency_penalty[r]
    logits = adjust_oracle(logits, row, prompt_length, *penalties, bias).astype(np.float32)
    if s.temperature[r] == 0:
        return int(np.argmax(logits))
    kept, _ = filtered_oracle(logits, s.temperature[r], int(s.top_k[r]), float(s.top_p[r]), float(s.min_p[r]))
    return int(np.argmax(kept + perturbation[len(row)]))


def decode_oracle(toy, table, prompts, limits, sampling: Sampling, size):
    """Decode plainly in a Python loop with the package's noise; return (rows, log-probabilities of the new tokens)."""
    perturbation = perturbation_of(sampling, size)
    s = jax.tree.map(np.asarray, sampling)
    out, logprobs = [], []
    for r, prompt in enumerate(prompts):
        row, scores = list(prompt), []
        while len(row) < min(limits[r], size - SLACK) and not (len(row) > len(prompt) and row[-1] in s.stop_token_ids):
            given = toy.truth(table, row)
            token = choice_oracle(given, row, len(prompt), s, r, perturbation[r])
            scores.append(float(np.log(softmax(given)[token])))
            row.append(token)
        out.append(row)
        logprobs.append(scores)
    return out, logprobs


def lookup_oracle(tokens, n, max_ngram=3, min_ngram=1):
    """Propose n tokens after a list of tokens, or none, by trying every n-gram, longest first, and every place, latest first."""
    for size in range(max_ngram, min_ngram - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[len(tokens) - size :]:
                period = tokens[end:]
                return [period[i % len(period)] for i in range(n)]
    return []
