"""Settings of sampling: broadcast over the rows, numbered seeds, and one sentence for every bad value."""

import math

import numpy as np
import pytest

from mlspecqd_jax.speculation.settings import Sampling


def test_one_bias_mapping_is_for_all_rows():
    shared = Sampling.create(2, 5, logit_bias={1: 2.0, 3: -math.inf}).logit_bias
    assert np.array_equal(shared, [[0, 2, 0, -math.inf, 0]] * 2)
    apart = Sampling.create(2, 5, logit_bias=[{1: 2.0}, {}]).logit_bias
    assert np.array_equal(apart, [[0, 2, 0, 0, 0], [0] * 5])


def test_create_broadcasts_and_numbers_seeds():
    sampling = Sampling.create(3, 50, temperature=0.5, top_k=[1, 2, 3], seed=7, stop_token_ids=[4, 5])
    assert sampling.temperature.tolist() == [0.5] * 3
    assert sampling.top_k.tolist() == [1, 2, 3]
    assert sampling.seed.tolist() == [7, 8, 9]
    assert sampling.stop_token_ids.tolist() == [4, 5] + [-1] * 6
    assert sampling.logit_bias is None
    assert Sampling.create(2, 50, seed=[5, 5]).seed.tolist() == [5, 5]
    assert Sampling.create(2, 50, seed=2**32 - 2).seed.tolist() == [2**32 - 2, 2**32 - 1]
    assert [len(Sampling.create(1, 50, stop_token_ids=range(n)).stop_token_ids) for n in (0, 1, 8, 9)] == [8, 8, 8, 16]
    assert Sampling.create(1, 50, stop_token_ids=np.arange(8)).stop_token_ids.tolist() == list(range(8))
    assert Sampling.create(1, 50, logit_bias={np.int64(3): np.float32(2)}).logit_bias[0, 3] == 2
    assert Sampling.create(1, 50, top_k=2**40).top_k[0] >= 50  # more than there are tokens, not what is left of the bits


BAD = [
    ("temperature", -0.1, "0 (greedy) or more"),
    ("temperature", math.nan, "0 (greedy) or more"),
    ("temperature", math.inf, "0 (greedy) or more"),
    ("temperature", 1e39, "0 (greedy) or more"),  # inf in float32
    ("temperature", "hot", "0 (greedy) or more"),
    ("temperature", None, "0 (greedy) or more"),
    ("temperature", True, "0 (greedy) or more"),
    ("temperature", 1j, "0 (greedy) or more"),
    ("temperature", {1.0}, "0 (greedy) or more"),
    ("top_k", "3", "0 (off) or a positive whole number"),
    ("logit_bias", dict.fromkeys(range(9), -math.inf), "bans every token of row 0; leave at least one"),
    ("temperature", [1.0, 1.0], "one for each of 3 rows"),
    ("temperature", [[1.0, 1.0, 1.0]], "one for each of 3 rows"),
    ("temperature", [1.0, -1.0, 1.0], "0 (greedy) or more"),
    ("top_k", -1, "0 (off) or a positive whole number"),
    ("top_k", 2.5, "0 (off) or a positive whole number"),
    ("top_k", math.nan, "0 (off) or a positive whole number"),
    ("top_p", 0.0, "more than 0 and at most 1"),
    ("top_p", 1.1, "more than 0 and at most 1"),
    ("min_p", -0.1, "between 0 (off) and 1"),
    ("min_p", 1.5, "between 0 (off) and 1"),
    ("repetition_penalty", 0.0, "positive"),
    ("repetition_penalty", -1.0, "positive"),
    ("presence_penalty", math.inf, "finite"),
    ("frequency_penalty", math.nan, "finite"),
    ("seed", -1, "from 0 to 2**32 - 1"),
    ("seed", 2**32 - 2, "from 0 to 2**32 - 1"),  # the third row's would not fit
    ("seed", 1.5, "a whole number from 0"),
    ("seed", None, "a whole number from 0"),
    ("seed", [1, 2], "one for each of 3 rows"),
    ("seed", [1, 2, 3.5], "whole number"),
    ("rule", "hope", "coupled, rejection"),
    ("logit_bias", {9: 1.0}, "ids from 0 to 8"),
    ("logit_bias", {"a": 1.0}, "ids from 0 to 8"),
    ("logit_bias", {1: math.inf}, "a finite number, or -inf"),
    ("logit_bias", {1: math.nan}, "a finite number, or -inf"),
    ("logit_bias", {1: "x"}, "a finite number, or -inf"),
    ("logit_bias", [{1: 1.0}], "a list of one for each of 3 rows"),
    ("logit_bias", [{1: 1.0}, None, {}], "a list of one for each of 3 rows"),
    ("logit_bias", 3.0, "a list of one for each of 3 rows"),
    ("stop_token_ids", [-1], "token id"),
    ("stop_token_ids", [1.5], "token id"),
    ("stop_token_ids", ["a"], "token id"),
    ("stop_token_ids", 5, "token id"),
]


@pytest.mark.parametrize(("name", "value", "need"), BAD)
def test_create_refuses_with_a_sentence(name, value, need):
    with pytest.raises(ValueError, match=name) as error:
        Sampling.create(3, 9, **{name: value})
    assert need in str(error.value)
