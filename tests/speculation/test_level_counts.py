"""What levels count (C10): a plain account of the rounds, and the acceptance rates that benchmarks ask for."""

import jax
import numpy as np
import pytest
from chains import (
    CHAINS,
    MIXED,
    PROMPTS,
    B,
    S,
    counts_of_rows,
    generate,
    limits_of,
    near,
    sampling_of,
    stack_of,
    table,
    toy,
    with_models,
)
from oracles import choice_oracle, lookup_oracle, perturbation_of
from scipy import stats
from toys import level_counts

from mlspecqd_jax.speculation.buffers import SLACK

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


class Account:
    """What the rounds of a coupled stack of toys do to one row, in plain Python: its tokens and the counts of every level."""

    def __init__(self, name, tables, settings, r, perturbation, prompt, limit):
        self.names, self.draft_lens = name.split(">"), CHAINS[name]
        self.tables = [np.asarray(t) for t in tables]
        self.settings, self.r, self.perturbation, self.prompt = settings, r, perturbation, prompt
        self.counts = [[0, 0, [0] * g, [0] * g] for g in [*self.draft_lens, 0][: len(tables)]]
        self.row = prompt + self.filled(0, prompt, min(limit, S - SLACK))

    def filled(self, level, row, limit):
        """Run rounds of a level until the limit or a stop token."""
        new = []
        while len(row) + len(new) < limit and not (new and self.stops(new[-1])):
            new += self.round(level, row + new, limit)
        return new

    def round(self, level, row, limit):
        draft = self.draft(level, row, limit) if level < len(self.draft_lens) else []
        new = []
        while len(new) <= len(draft) and new == draft[: len(new)]:
            new.append(self.choice(level, row + new))
        accepted, appended = len(new) - 1, new
        for i, token in enumerate(new):
            if self.stops(token):
                appended = new[: i + 1]
                break
        kept = len(draft) if appended == new else min(len(draft), len(appended))
        counts = self.counts[level]
        counts[0] += 1
        counts[1] += kept
        for g in range(kept):
            counts[2][g] += g < accepted
            counts[3][g] += g <= accepted
        return appended

    def draft(self, level, row, limit):
        useful = min(self.draft_lens[level], limit - len(row) - 1)
        if self.names[level] == "ngram":
            return lookup_oracle(row, useful)
        return self.filled(level + 1, row, len(row) + useful)

    def choice(self, level, row):
        logits = toy.truth(self.tables[level], row)
        return choice_oracle(logits, row, len(self.prompt), self.settings, self.r, self.perturbation)

    def stops(self, token):
        return token in self.settings.stop_token_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "own>shared>own",
        *(pytest.param(n, marks=exhaustive) for n in ("shared>own", "own>shared", "shared>ngram", "own", "own>own")),
    ],
)
def test_counts_are_those_of_a_plain_account(name):
    """C10: at every level, for limits at every offset and with stop tokens within blocks, within drafts and in none."""
    tables = [table, near(1), near(2), near(3)][: with_models(name)]
    for stops in ([], [5, 2]):
        sampling = sampling_of(seed=21, stop_token_ids=stops, **MIXED)
        settings, perturbation = jax.tree.map(np.asarray, sampling), perturbation_of(sampling, S)
        out, state = generate(stack_of(name, tables[1:]), limits_of(), sampling)
        for r, prompt in enumerate(PROMPTS):
            account = Account(name, tables, settings, r, perturbation[r], prompt, limits_of()[r])
            assert out[r] == account.row
            assert counts_of_rows(state, r) == account.counts
        assert state.counts.passes == state.counts.rounds.max()
        for counts in level_counts(state)[: len(CHAINS[name])]:
            assert 0 < counts.accepted.sum() < counts.judged.sum() <= counts.drafted.sum()


def measured(stack, rule, rates, requests=6):
    """Return (accepted, judged) of each level that judges, over a few requests."""
    total = np.zeros((len(rates), 2), int)
    for seed in range(requests):
        sampling = sampling_of(rule=rule, seed=1000 * seed, temperature=1, synthetic_acceptance=rates)
        _, state = generate(stack, [S - SLACK] * B, sampling)
        total += np.array([[counts.accepted.sum(), counts.judged.sum()] for counts in level_counts(state)[: len(rates)]])
    return total


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("shared>ngram", "coupled"),
        pytest.param("own>own", "rejection", marks=exhaustive),
        pytest.param("shared>own", "coupled", marks=slow),
    ],
)
def test_synthetic_acceptance_is_what_was_asked_for(name, rule):
    """Each level that judges, at its own rate; 0 and 1 are exact, though no model agrees with another."""
    stack = stack_of(name, [toy.table(5), toy.table(6)][: with_models(name) - 1])
    for rates in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        accepted, judged = measured(stack, rule, rates, requests=1).T
        assert (accepted / judged).tolist() == list(rates)
    # Where the target accepts all, no position is met twice, so that the inner level's coins are as independent as the target's.
    for rates in ((1.0, 0.6), (0.7, 0.9), (0.35, 0.2)):
        counts = measured(stack, rule, rates)
        assert stats.binomtest(*counts[0].tolist(), rates[0]).pvalue > 1e-4
        if rates[0] == 1:
            assert stats.binomtest(*counts[1].tolist(), rates[1]).pvalue > 1e-4
            assert stats.binomtest(*counts[1].tolist(), rates[1] + 0.08).pvalue < 1e-4  # the bound is no empty one
        else:
            assert abs(counts[1][0] / counts[1][1] - rates[1]) < 0.1
