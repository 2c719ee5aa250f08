"""`stack`: what is built from a target and its drafters, and what is refused; drafters as the command line spells them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
import mlspecqd_jax as mlsd
from mlspecqd_jax import generation, specs, stacks
from mlspecqd_jax.network import network
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.speculation.drafters.prompt_lookup import PromptLookup
from mlspecqd_jax.weights.mx import quantize
from mlspecqd_jax.weights.tensors import EMBEDDING

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
PROMPTS = ["def fibonacci(n):\n", "import os\n", "class Stack:\n    def push(self, item):\n"]
NEW = 24


def shallow(model, name):
    """The model cut to its first layer, a fast one of the same tokenizer."""
    network = Network(dataclasses.replace(model.network.config, layers=model.network.config.layers[:1]))
    params = {name: model.params[name] + 0 for name in network.tensors()}
    return dataclasses.replace(model, network=network, params=params, card=dataclasses.replace(model.card, name=name))


@pytest.fixture(scope="module")
def other(demo):
    """Not the target's twin, and drafts badly."""
    return shallow(demo, "other")


@pytest.fixture(scope="module")
def quick(demo):
    """A target whose programs compile fast."""
    return shallow(demo, "quick")


def lengths(stack):
    return [level.draft_len for level in stack.levels]


def test_stacks_are_built_from_the_inside(demo, other):
    twin, lookup = demo.quantized(), mlsd.prompt_lookup(max_ngram=4)
    plain = mlsd.stack(demo)
    assert (lengths(plain), plain.level.drafter, plain.level.window()) == ([0], None, 1)
    stack = mlsd.stack(demo, (twin, 6), (other, 3), (lookup, 2))
    assert lengths(stack) == [6, 3, 2]
    assert [card.name for card in stack.cards] == ["demo", "demo@mxfp4", "other"]
    assert [level.share_cache for level in stack.levels] == [False, True, False]
    assert stack.levels[-1].drafter == lookup
    assert [level.window() for level in stack.levels] == [7, 4, 3]
    assert lengths(mlsd.stack(demo, twin)) == [5, 0]
    assert lengths(mlsd.stack(demo, other, twin, lookup)) == [5, 3, 4]
    own = mlsd.stack(demo, (twin, 6), share_cache=False)
    assert [level.share_cache for level in own.levels] == [False, False]
    assert mlsd.stack(demo, (twin, 6), exact=False).level.window() == 7


def test_twins_share_what_is_not_quantized(demo):
    fine, coarse = demo.quantized("mxfp8_e4m3"), demo.quantized()
    stack = mlsd.stack(demo, (fine, 6), (coarse, 3))
    assert [level.share_cache for level in stack.levels] == [False, True, True]
    embeddings = {id(level.params[EMBEDDING]) for level in stack.levels}
    assert len(embeddings) == 1


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:demo accepts", "ignore:other accepts")
@pytest.mark.parametrize(
    ("given", "share_cache"),
    [
        (["mxfp4:4", "ngram:3"], True),
        pytest.param(["mxfp4"], False, marks=exhaustive),
        pytest.param(["mxfp4:5", "other:2"], True, marks=slow),
        pytest.param(["other@mxfp6_e2m3:3", "ngram"], True, marks=slow),
        pytest.param(["mxfp8_e4m3:6", "mxfp4:3"], True, marks=exhaustive),
        pytest.param(["other:4", "mxfp4:2"], False, marks=slow),
    ],
    ids=str,
)
def test_every_stack_gives_the_text_of_plain_decoding(demo, other, given, share_cache, monkeypatch):
    monkeypatch.setattr(specs, "is_known", lambda name: name == "other")
    stack = mlsd.stack(demo, *specs.drafters(specs.parse(given), demo, lambda name: other), share_cache=share_cache)
    for choice in ({}, {"temperature": 0.8, "seed": 3}):
        arguments = {"max_new_tokens": [NEW, NEW - 5, NEW + 4], "logprobs": True} | choice
        plain = mlsd.generate(mlsd.stack(demo), PROMPTS, **arguments)
        out = mlsd.generate(stack, PROMPTS, **arguments)
        assert out.tokens == plain.tokens
        assert out.text == plain.text
        for ours, theirs in zip(out.logprobs, plain.logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        levels = out.report["levels"]
        assert len(levels) == len(given) + 1
        assert levels[0]["accepted"] > 0


@exhaustive
def test_prompts_across_the_edges_of_buckets(quick):
    """Of the pieces in which prompts are fed, to the target's cache and to a draft's own, and of the buffer."""
    draft = dataclasses.replace(quick, params=quick.params | {"model.norm.weight": 1.1 * quick.params["model.norm.weight"]})
    stack = mlsd.stack(quick, (draft, 3), (quick.quantized(), 2), share_cache=False)
    rng = np.random.default_rng(0)
    for lengths_ in ([1, 16, 17], [18, 64, 65], [66, 171, 172], [173, 256, 257], [258, 428, 429]):
        prompts = [rng.integers(1, 4000, size=n).tolist() for n in lengths_]
        plain = mlsd.generate(mlsd.stack(quick), prompts, max_new_tokens=20, stop_token_ids=[])
        out = mlsd.generate(stack, prompts, max_new_tokens=20, stop_token_ids=[])
        assert out.tokens == plain.tokens
        # The same model but for a scale is always right when greedy, if it was fed the prompt.
        assert out.report["levels"][0]["token_acceptance"] == 1


def test_the_twin_is_accepted_and_reported_by_level_and_request(demo):
    stack = mlsd.stack(demo, (demo.quantized(), 4), (mlsd.prompt_lookup(), 3))
    out = mlsd.generate(stack, PROMPTS, max_new_tokens=48, stop_token_ids=[], logprobs=True)
    target, twin, lookup = out.report["levels"]
    assert [level["name"] for level in (target, twin, lookup)] == ["demo", "demo@mxfp4", "ngram"]
    assert [level["draft_len"] for level in (target, twin, lookup)] == [4, 3, 0]
    assert target["token_acceptance"] > 0.6
    assert target["accepted"] + target["rounds"] == 3 * 48
    assert target["acceptance_rate"] == target["accepted"] / target["drafted"]
    assert target["mean_acceptance_length"] == 1 + target["accepted"] / target["rounds"]
    assert [len(level["acceptance_by_position"]) for level in (target, twin, lookup)] == [4, 3, 0]
    assert [sum(level["judged_by_position"]) for level in (target, twin, lookup)] == [target["judged"], twin["judged"], 0]
    assert (lookup["token_acceptance"], lookup["passes"], lookup["rounds"]) == (None, 0, 0)
    requests = out.report["requests"]
    for count in ("rounds", "drafted", "accepted", "judged"):
        assert sum(request[count] for request in requests) == target[count]
        assert sum(request["below"][0][count] for request in requests) == twin[count]


@slow
def test_a_draft_that_is_never_right_is_warned_of(quick):
    twin = quick.quantized()
    wrong = dataclasses.replace(twin, params=twin.params | {"model.norm.weight": -twin.params["model.norm.weight"]})
    arguments = {"max_new_tokens": 20, "stop_token_ids": []}
    with pytest.warns(UserWarning, match=r"quick accepts \d% of the tokens that quick@mxfp4 drafts \(\d+ judged\)"):
        out = mlsd.generate(mlsd.stack(quick, (wrong, 4)), PROMPTS * 2, **arguments)
    assert out.tokens == mlsd.generate(mlsd.stack(quick), PROMPTS * 2, **arguments).tokens


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_synthetic_acceptance_is_what_was_asked_for_and_marked(quick):
    stack = mlsd.stack(quick, (quick.quantized(), 4))
    for rate in (1.0, 0.0):
        out = mlsd.generate(stack, PROMPTS, max_new_tokens=20, stop_token_ids=[], synthetic_acceptance=[rate])
        assert out.report["synthetic_acceptance"] == [rate]
        assert [level["token_acceptance"] for level in out.report["levels"]] == [rate, None]
    with pytest.raises(ValueError, match="synthetic_acceptance has 2 rates, but 1 levels of the stack judge a draft"):
        mlsd.generate(stack, PROMPTS, synthetic_acceptance=[0.5, 0.5])
    with pytest.raises(ValueError, match=r"synthetic_acceptance is 1\.5, but must be a probability"):
        mlsd.generate(stack, PROMPTS, synthetic_acceptance=1.5)


def renamed(model, **changes):
    return dataclasses.replace(model, card=dataclasses.replace(model.card, **changes))


class Words:
    """A stand-in for a tokenizer: its tokens and which of them were added."""

    def __init__(self, vocab, added=()):
        self.vocab, self.added = vocab, added

    def get_vocab(self):
        return self.vocab

    def get_added_vocab(self):
        return {token: self.vocab[token] for token in self.added}


def test_what_does_not_fit_is_refused(demo, other):
    twin = demo.quantized()
    low = mlsd.load("demo", dtype="bfloat16")
    for drafters, message in [
        ([(twin, 0)], "draft_len is 0, but must be a whole number of at least 1"),
        ([(twin, 2.5)], r"draft_len is 2\.5"),
        ([(twin, True)], "draft_len is True"),
        ([(twin, 64)], "draft_len 64 needs a window of 65 positions; at most 64"),
        ([(twin, 3), (other, 70)], "draft_len 70 needs a window of 71 positions; at most 64"),
        ([(twin, 3, 4)], "demo@mxfp4 comes with 2 values, but needs one"),
        (["mxfp4"], "a drafter is 'mxfp4', but must be a Model"),
        ([(), 3], r"a drafter is \(\), but must be a Model"),
        ([mlsd.prompt_lookup(), twin], "ngram has no weights that demo@mxfp4 could draft for; put it last"),
        ([low], "demo is in bfloat16 and demo in float32; load both in one dtype"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            mlsd.stack(demo, *drafters)
        assert "\n" not in str(caught.value)


def test_the_exact_width_bounds_the_draft_where_windows_are_sixteen_rows(demo, monkeypatch):
    """C7."""
    for chip in ("TPU v5 lite", "sm_90"):
        monkeypatch.setattr(network, "chip_of", lambda device, chip=chip: chip)
        assert [stacks.exact_rows(demo, draft_len) for draft_len in (0, 15)] == [16, 16]
        with pytest.raises(ValueError, match="draft_len 16 is more than the 15 that exact=True allows on GPU and TPU; pass"):
            mlsd.stack(demo, (demo.quantized(), 16))
        assert mlsd.stack(demo, (demo.quantized(), 16), exact=False).level.window() == 17
    monkeypatch.undo()
    monkeypatch.setattr(cpu_kernels.products, "usable", lambda unit="": False)
    monkeypatch.setattr(cpu_kernels, "usable", lambda unit="": False)
    assert stacks.exact_rows(mlsd.load("demo"), 40) == 2
    with pytest.raises(ValueError, match=r"cannot be promised for float32 on CPU without the C\+\+ kernels.* exact=False"):
        mlsd.stack(demo)


def test_windows_are_padded_unless_all_rows_are_computed_apart(demo):
    low, up = mlsd.load("demo"), "model.layers.0.mlp.up_proj.weight"
    twins = (quantize(low.params[up], format) for format in ("mxfp4", "mxfp8_e4m3"))
    mxfp4, mxfp8 = (dataclasses.replace(low, params=low.params | {up: leaf}) for leaf in twins)
    apart = cpu_kernels.usable()
    assert [model.network.row_multiple(model.params) for model in (low, mxfp4, mxfp8)] == [1 if apart else 2] * 3
    assert not apart or demo.network.row_multiple(demo.params) == 1
    assert mlsd.stack(low).level.window() == (1 if apart else 2)
    assert mlsd.stack(low, (mlsd.prompt_lookup(), 6)).level.window() == (7 if apart else 8)


def test_tokenizers_are_compared_by_their_tokens(demo, other):
    one = renamed(demo, tokenizer=Words({"a": 0, "b": 1, "<s>": 2}, ["<s>"]))
    for vocab, added, message in [
        ({"a": 0, "c": 1}, (), r"token 1 is 'c' in the one and 'b' in the other"),
        ({"b": 0, "a": 1}, (), r"token 0 is 'b' in the one and 'a' in the other"),
        ({"a": 0, "b": 1, "d": 3}, (), r"token 3 is 'd' in the one and None in the other"),
    ]:
        with pytest.raises(ValueError, match=f"the tokenizers of other and demo differ: {message}"):
            mlsd.stack(one, renamed(other, tokenizer=Words(vocab, added)))
    for fitting in (None, Words({"a": 0, "b": 1}), Words({"a": 0, "b": 1, "<s>": 2, "<pad>": 9}, ["<s>", "<pad>"])):
        assert lengths(mlsd.stack(one, renamed(other, tokenizer=fitting))) == [5, 0]


def test_meshes_must_agree(demo):
    mesh = jax.make_mesh((1,), ("model",))
    elsewhere = mlsd.load("demo", dtype="float32", mesh=mesh)
    with pytest.raises(ValueError, match="on different meshes or devices"):
        mlsd.stack(demo, elsewhere)
    assert lengths(mlsd.stack(elsewhere, elsewhere.quantized(), exact=False)) == [5, 0]


def test_a_draft_of_too_few_positions_is_refused(demo, other):
    stack = mlsd.stack(demo, renamed(other, max_positions=20))
    with pytest.raises(ValueError, match=r"other has 20 positions, but prompt and new tokens take \d+; lower max_new_tokens"):
        mlsd.generate(stack, PROMPTS[0])


@exhaustive
def test_padded_vocabularies_of_one_tokenizer_draft_for_each_other(quick):
    """A draft of fewer and of more logits than the target; the latter's favourites are tokens that the target has not got."""
    plain = mlsd.generate(mlsd.stack(quick), PROMPTS, max_new_tokens=NEW, temperature=0.7)
    config, embedding = quick.network.config, quick.params[EMBEDDING]
    for size in (config.vocab_size - 64, config.vocab_size + 64):
        network = Network(dataclasses.replace(config, vocab_size=size))
        padded = jnp.concatenate([embedding, 100 * embedding[:64]])[:size]
        draft = dataclasses.replace(quick, network=network, params=quick.params | {EMBEDDING: padded})
        out = mlsd.generate(mlsd.stack(quick, (draft, 3)), PROMPTS, max_new_tokens=NEW, temperature=0.7)
        assert out.report["levels"][0]["token_acceptance"] > 0.9
        assert out.tokens == plain.tokens


def test_specs_spell_drafters(demo):
    loaded = []

    def load(name):
        loaded.append(name)
        return demo

    def pairs(*given):
        return specs.drafters(specs.parse(given), demo, load)

    assert pairs("none") == []
    [(twin, length)] = pairs("mxfp4")
    assert (twin.card.name, length) == ("demo@mxfp4", 5)
    found = pairs("mxfp8_e4m3:8", "mxfp4", "ngram")
    assert [(stacks.name_of(drafter), length) for drafter, length in found] == [
        ("demo@mxfp8_e4m3", 8),
        ("demo@mxfp4", 3),
        ("ngram", 4),
    ]
    assert loaded == []
    found = pairs("demo@mxfp4:7", "mxfp4:2", "demo:3", "ngram:9")
    assert [length for _, length in found] == [7, 2, 3, 9]
    assert found[0][0] is found[1][0]  # in that format already: its own twin
    assert found[2][0] is demo
    assert found[3][0] == PromptLookup()
    assert loaded == ["demo", "demo"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mxfp5"], r"--draft mxfp5 is no draft: give a format \(mxfp4, mxfp6_e2m3"),
        (["demo@int4"], "--draft demo@int4 is no draft"),
        (["mxfp4:"], "--draft mxfp4: is no draft"),
        ([""], "is no draft"),
        (["mxfp4:0"], "draft_len is 0, but must be a whole number of at least 1"),
        (["ngram", "mxfp4"], "--draft mxfp4 cannot draft for ngram, which has no weights; put ngram last"),
        (["ngram:3", "demo"], "--draft demo cannot draft for ngram"),
        (["none", "mxfp4"], "--draft none is plain decoding and stands alone"),
    ],
)
def test_other_specs_are_refused_before_anything_is_loaded(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        specs.parse(given)
    assert "\n" not in str(caught.value)


def test_exact_stacks_on_gpu_are_compiled_for_one_algorithm_a_product(quick):
    """Elsewhere, and for others, there are no options; what is no stack is told so."""

    class Elsewhere:
        def __init__(self, platform):
            self.platform = platform

        def devices(self):
            return {self}

    def options(platform, exact):
        stack = mlsd.stack(quick, exact=exact)
        level = dataclasses.replace(stack.level, params={EMBEDDING: Elsewhere(platform)})
        return mlsd.compiler_options(dataclasses.replace(stack, level=level))

    assert options("gpu", True) == {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    assert options("gpu", False) == options("tpu", True) == options("cpu", True) == {}
    assert mlsd.compiler_options(mlsd.stack(quick)) == {}
    with pytest.raises(mlsd.InputError, match="stack"):
        mlsd.compiler_options(quick)


@pytest.mark.slow
def test_a_limit_of_drafts_for_each_row(quick):
    """Rows that draft less, or nothing, say the same."""
    stack = mlsd.stack(quick, (quick.quantized(), 4))
    arguments = {"max_new_tokens": 20, "stop_token_ids": [], "temperature": 0.6}
    free = mlsd.generate(stack, PROMPTS * 2, **arguments)
    before = generation.programs(stack).advance._cache_size()
    out = mlsd.generate(stack, PROMPTS * 2, draft_limit=[0, 2, 99, 4, 4, 4], **arguments)
    assert generation.programs(stack).advance._cache_size() == before
    assert out.tokens == free.tokens
    none, two, all_ = out.report["requests"][:3]
    assert (none["rounds"], none["drafted"]) == (20, 0)
    assert two["acceptance_by_position"][2:] == [None, None]
    assert two["drafted"] > 0
    assert all_ == free.report["requests"][2]
    with pytest.raises(ValueError, match="draft_limit is -1, but must be 0"):
        mlsd.generate(stack, PROMPTS, draft_limit=-1)


def cache_bytes(stack):
    """Return the bytes of all caches that a generation allocates."""
    batch = mlsd.prepare(stack, PROMPTS, max_new_tokens=8)
    sampling = mlsd.Sampling.create(len(PROMPTS), stack.card.vocab_size)
    state = jax.eval_shape(mlsd.init, stack, batch.tokens, batch.length, sampling)
    caches, part = [], state
    while part is not None:
        caches, part = caches + jax.tree.leaves(part.cache), part.below
    return sum(leaf.size * leaf.dtype.itemsize for leaf in caches)


def test_a_twin_adds_no_cache_unless_asked_to(demo, other):
    plain = cache_bytes(mlsd.stack(demo))
    fine, coarse = demo.quantized("mxfp8_e4m3"), demo.quantized()
    assert cache_bytes(mlsd.stack(demo, fine, coarse)) == plain
    assert cache_bytes(mlsd.stack(demo, fine, coarse, share_cache=False)) == 3 * plain
    assert cache_bytes(mlsd.stack(demo, other)) == plain + cache_bytes(mlsd.stack(other))


def test_a_stack_is_a_tree_of_its_weights(demo):
    stack = mlsd.stack(demo, demo.quantized())
    assert isinstance(jax.tree.map(lambda x: x, stack), mlsd.Stack)
    assert len(jax.tree.leaves(stack)) > 2 * len(demo.params)
