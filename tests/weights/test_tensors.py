"""Rows of a checkpoint's tensors: every layout that fuses, interleaves, stacks or transposes is undone by one formula."""

import numpy as np
import pytest

from mlspecqd_jax.weights.tensors import Source, Tensor, parameters, read, stored_shapes

K, HEADS, KV, D = 5, 4, 2, 3
RANDOM = np.random.RandomState(0)
Q, KEYS, VALUES = (RANDOM.standard_normal((n * D, K)).astype(np.float32) for n in (HEADS, KV, KV))


def of(rows: np.ndarray, *sources: Source) -> Tensor:
    return Tensor(rows.shape, (), False, sources)


def by_head(*arrays):
    """Join the rows of each head: [head 0 of the one, head 0 of the other, head 1 of the one, ...]."""
    return np.concatenate([array.reshape(KV, -1, *array.shape[1:]) for array in arrays], axis=1).reshape(-1, *arrays[0].shape[1:])


FUSED = ("qkv",)
LAYOUTS = {
    "its own": ({"q": Q}, {"q": Source(("q",))}),
    "one after another": (
        {"qkv": np.concatenate([Q, KEYS, VALUES])},
        {"q": Source(FUSED, 1, 0, 12), "k": Source(FUSED, 1, 12, 18), "v": Source(FUSED, 1, 18, None)},
    ),
    "transposed": (
        {"qkv": np.concatenate([Q, KEYS, VALUES]).T},
        {
            "q": Source(FUSED, 1, 0, 12, True),
            "k": Source(FUSED, 1, 12, 18, True),
            "v": Source(FUSED, 1, 18, 24, True),
        },
    ),
    "by the head": (
        {"qkv": by_head(Q, KEYS, VALUES)},
        {"q": Source(FUSED, KV, 0, 6), "k": Source(FUSED, KV, 6, 9), "v": Source(FUSED, KV, 9, 12)},
    ),
    "interleaved": (
        {"kv": np.stack([KEYS, VALUES], axis=1).reshape(-1, K)},
        {"k": Source(("kv",), KV * D, 0, 1), "v": Source(("kv",), KV * D, 1, 2)},
    ),
    "in pieces": (
        {"q.0": Q[:3], "q.1": Q[3:6], "q.2": Q[6:9], "q.3": Q[9:]},
        {"q": Source(("q.0", "q.1", "q.2", "q.3"))},
    ),
}
TARGETS = {"q": Q, "k": KEYS, "v": VALUES}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_found(layout, bias):
    stored, sources = LAYOUTS[layout]
    targets = {name: TARGETS[name][:, 1] if bias else TARGETS[name] for name in sources}
    if bias:  # the second column of each weight
        transposed = layout == "transposed"
        stored = {name: np.ascontiguousarray(array.T[:, 1] if transposed else array[:, 1]) for name, array in stored.items()}
    tensors = {name: of(targets[name], source) for name, source in sources.items()}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read(tensor, stored.__getitem__), targets[name])
    assert stored_shapes(tensors) == {name: array.shape for name, array in stored.items()}


def test_a_tensor_of_two_sources_is_one_after_the_other():
    tensor = of(np.concatenate([KEYS, Q[:4]]), Source(("k",), 1, 0, 6), Source(("q",), 1, 0, 4))
    np.testing.assert_array_equal(read(tensor, {"k": KEYS, "q": Q}.__getitem__), np.concatenate([KEYS, Q[:4]]))


def test_a_tensor_that_is_its_source_is_not_copied():
    assert read(of(Q, Source(("q",))), {"q": Q}.__getitem__) is Q


def test_parameters_are_counted():
    assert parameters({"q": of(Q), "bias": of(Q[:, 0])}) == 12 * K + 12


@pytest.mark.parametrize("heads", [1, KV])
def test_parts_are_turned(heads):
    """Of each head [K, D] that was [D, K], and rows behind it that are taken as they are."""
    keys = RANDOM.standard_normal((heads * D, K)).astype(np.float32)
    behind = RANDOM.standard_normal((heads * 2, D)).astype(np.float32)
    turned = keys.reshape(heads, D, K).swapaxes(1, 2)
    stored = {"kv": np.concatenate([turned, behind.reshape(heads, 2, D)], axis=1).reshape(-1, D)}
    tensors = {"k": of(keys, Source(("kv",), heads, 0, K, turn=True)), "v": of(behind, Source(("kv",), heads, K, K + 2))}
    assert stored_shapes(tensors) == {"kv": (heads * (K + 2), D)}
    for name, expected in (("k", keys), ("v", behind)):
        np.testing.assert_array_equal(read(tensors[name], stored.__getitem__), expected)
    alone = {"k": of(keys, Source(("k",), heads, turn=True))}
    assert stored_shapes(alone) == {"k": (heads * K, D)}
    np.testing.assert_array_equal(read(alone["k"], {"k": turned.reshape(-1, D)}.__getitem__), keys)
