"""`stack`: what is built from a target and its drafters, and what is refused."""

import dataclasses

import jax
import pytest
from short_prompts import PROMPTS

import cpu_kernels
import mlspecqd_jax as mlsd
from mlspecqd_jax import stacks
from mlspecqd_jax.network import network
from mlspecqd_jax.programs import ONE_ALGORITHM
from mlspecqd_jax.speculation.buffers import SLACK
from mlspecqd_jax.speculation.drafters.either import Either
from mlspecqd_jax.weights.cast import quantize
from mlspecqd_jax.weights.tensors import EMBEDDING


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


def test_what_pays_is_drafted_by_a_model_or_look_up(demo, other):
    """lengths="auto": look-up beside each model, caps in place of lengths, and times guessed from bytes."""
    twin, lookup = demo.quantized(), mlsd.prompt_lookup(max_ngram=4)
    alone = mlsd.stack(demo, lengths="auto")
    assert lengths(alone) == [15]
    assert alone.level.drafter == mlsd.prompt_lookup()
    one = mlsd.stack(demo, (twin, 6), lookup, lengths="auto")
    assert lengths(one) == [6, 7]
    assert one.level.drafter == Either(one.levels[1], lookup)
    assert one.levels[1].drafter == lookup
    two = mlsd.stack(demo, twin, other, lengths="auto")
    assert lengths(two) == [15, 7, 0]
    assert [type(level.drafter) for level in two.levels] == [Either, Either, type(None)]
    assert [card.name for card in two.cards] == ["demo", "demo@mxfp4", "other"]
    times = two.control.times
    assert times.shape == (3, SLACK + 1)
    assert times[0, 1] == 1
    assert 0.2 < times[1, 1] < 0.6
    assert two.control.most.tolist() == [[SLACK]] * 2
    chance = two.control.prior[..., 0] / two.control.prior[..., 1]
    assert chance[0, 1, 3] > chance[1, 1, 3]  # a twin's token is better by its lead than another model's
    by_default = mlsd.stack(demo, "auto")
    assert lengths(by_default) == [15]  # look-up, for a model of this size


def test_what_cannot_be_guided_is_refused(demo):
    class Own:
        name, init, propose = "own", None, None

    with pytest.raises(
        mlsd.InputError, match=r'lengths="auto" is for models and prompt_lookup\(\), not for own; pass lengths="fixed"'
    ):
        mlsd.stack(demo, Own(), lengths="auto")
    with pytest.raises(mlsd.InputError, match="lengths is 'some', but must be one of fixed, auto"):
        mlsd.stack(demo, lengths="some")


def test_twins_share_what_is_not_quantized(demo):
    fine, coarse = demo.quantized("mxfp8_e4m3"), demo.quantized()
    stack = mlsd.stack(demo, (fine, 6), (coarse, 3))
    assert [level.share_cache for level in stack.levels] == [False, True, True]
    embeddings = {id(level.params[EMBEDDING]) for level in stack.levels}
    assert len(embeddings) == 1


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
    monkeypatch.setattr(cpu_kernels.library, "usable", lambda unit="": False)
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
        unknown = (
            "; and which bytes their tokens stand for is known of .* alone, which Words is not; draft with a model of the target's"
        )
        with pytest.raises(ValueError, match=f"the tokenizers of other and demo differ: {message}{unknown}"):
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

    assert options("gpu", True) == ONE_ALGORITHM
    assert options("gpu", False) == options("tpu", True) == options("cpu", True) == {}
    assert mlsd.compiler_options(mlsd.stack(quick)) == {}
    with pytest.raises(mlsd.InputError, match="stack"):
        mlsd.compiler_options(quick)


def cache_bytes(stack):
    """Return the bytes of all caches that a generation allocates."""
    batch = mlsd.prepare(stack, PROMPTS, max_new_tokens=8)
    sampling = mlsd.Sampling.create(len(PROMPTS), stack.card.vocab_size)
    state = jax.eval_shape(mlsd.init, stack, batch.tokens, batch.length, sampling)
    caches, part = [], state
    while part is not None:
        caches, part = caches + jax.tree.leaves(part.cache), part.below
    return sum(leaf.size * leaf.dtype.itemsize for leaf in caches)


@pytest.mark.slow
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
