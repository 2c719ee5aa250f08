"""Laws 5 and 6 on a real model: whatever drafts and whoever shares the batch, the tokens of plain decoding of the prompt alone.

Rows of even number are greedy, those of odd number sampled with shared noise at T = 0.8. A partition is the sizes of the
batches that a case's prompts are decoded in, one after another.
"""

import itertools

import pytest
import real

import cpu_kernels
import mlspecqd_jax as mlsd
from mlspecqd_jax import specs

NEW = 100
PROMPTS = 100
STACKS = ("mxfp4:5", "ngram:4", "mxfp4:8 ngram:3", "mxfp8_e4m3:7 mxfp4:3, own caches", "none")
ALL = [1] * 12 + [2] * 6 + [4] * 5 + [8] * 3 + [16] * 2  # of all prompts
# The first prompt and the partition of what each stack decodes at every check, each prompt in one case only.
FEW = {
    "mxfp4:5": (0, [1]),
    "ngram:4": (1, [8]),
    "mxfp4:8 ngram:3": (9, [4]),
    "mxfp8_e4m3:7 mxfp4:3, own caches": (13, [2]),
    "none": (15, [16]),
}

pytestmark = pytest.mark.real
without_kernels = pytest.mark.skipif(cpu_kernels.usable(), reason="tried with MLSPECQD_CPU_KERNELS=0")


@pytest.fixture(scope="module")
def model():
    return real.load()


@pytest.fixture(scope="module")
def prompts(model, shared):
    return real.prompts(model.tokenizer, shared, PROMPTS)


@pytest.fixture(scope="module")
def long_prompts(model, shared):
    """Up to 300 tokens, so that in batches with long ones short ones meet longer buffers than alone."""
    return real.prompts(model.tokenizer, shared, PROMPTS, 300)


@pytest.fixture(scope="module")
def plain(model):
    """Return what gives the tokens of prompt and number, decoded plainly and alone, each once."""
    found = {}

    def plain(prompts, number):
        key = (tuple(prompts[number]), number)
        if key not in found:
            found[key] = decoded(mlsd.stack(model), prompts, [number])[0]
        return found[key]

    return plain


def decoded(stack, prompts, numbers):
    """Return the new tokens of prompts in one batch, each with the temperature and the seed that belong to its number."""
    temperature = [0.8 * (number % 2) for number in numbers]
    rows = [prompts[number] for number in numbers]
    return mlsd.generate(stack, rows, max_new_tokens=NEW, temperature=temperature, seed=list(numbers)).tokens


def rows_that_differ(model, prompts, plain, written, first, partition):
    """Return (size of the batch, number of the prompt, index of the first other token) of every row that is not as it is alone."""
    given, _, caches = written.partition(", ")
    drafters = specs.drafters(specs.parse(given.split()), model, mlsd.load)
    stack = mlsd.stack(model, *drafters, share_cache=not caches)
    wrong, ends = [], list(itertools.accumulate(partition, initial=first))
    for numbers in (range(begin, end) for begin, end in itertools.pairwise(ends)):
        for number, tokens in zip(numbers, decoded(stack, prompts, numbers), strict=True):
            expected = plain(prompts, number)
            if tokens != expected:
                pairs = itertools.zip_longest(tokens, expected)
                wrong.append((len(numbers), number, next(i for i, (a, b) in enumerate(pairs) if a != b)))
    return wrong


def test_the_cases_are_whole(prompts):
    assert len(prompts) == PROMPTS == sum(ALL)
    assert list(FEW) == list(STACKS)
    assert len({tuple(ids) for ids in prompts}) == PROMPTS
    assert len({len(ids) for ids in prompts}) > 30  # batches are ragged


@pytest.mark.parametrize("written", [pytest.param(s, marks=pytest.mark.exhaustive if "caches" in s else ()) for s in STACKS])
def test_rows_alone_and_in_batches_are_those_of_plain_decoding(model, prompts, plain, written):
    assert rows_that_differ(model, prompts, plain, written, *FEW[written]) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("written", STACKS)
def test_all_rows_alone_and_in_batches_are_those_of_plain_decoding(model, long_prompts, plain, written):
    assert rows_that_differ(model, long_prompts, plain, written, 0, ALL) == []


@without_kernels
@pytest.mark.parametrize(
    ("written", "first", "partition"),
    [
        ("ngram:4", 5, [4]),
        pytest.param("mxfp4:5", 0, [1, 4], marks=pytest.mark.exhaustive),
        pytest.param("ngram:4", 5, [1, 8], marks=pytest.mark.exhaustive),
        pytest.param("none", 0, [4], marks=pytest.mark.exhaustive),
    ],
)
def test_without_the_kernels_the_rows_are_those_of_plain_decoding_too(model, prompts, plain, written, first, partition):
    assert rows_that_differ(model, prompts, plain, written, first, partition) == []
