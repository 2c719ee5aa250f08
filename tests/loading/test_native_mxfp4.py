"""GPT-OSS with its experts in MXFP4, as it is published: what is loaded, and that it means what the same numbers in BF16 do."""

import functools
import json

import family_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from recorded import error
from refusals import refused

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading.description import describe
from mlspecqd_jax.weights.cast import dequantize
from mlspecqd_jax.weights.formats import FORMATS
from mlspecqd_jax.weights.quantized_array import QuantizedArray

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# Gate and up have K = 64, down K = 32.
CONFIG = family_files.CONFIGS["gpt_oss"] | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
PACKED = CONFIG | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
E, H, SIZE = CONFIG["num_local_experts"], 64, 32
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # E2M1, of codes without a sign


def stack(name: str, n: int, k: int):
    """Return (blocks, scales, their values [E, N, K]) by the definition of the format, one element after another."""
    random = np.random.RandomState(len(name))
    codes, scales = random.randint(0, 16, (E, n, k)), random.randint(122, 126, (E, n, k // 32))
    values = VALUES[codes & 7] * np.where(codes & 8, -1, 1) * np.repeat(np.exp2(scales - 127.0), 32, axis=-1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(E, n, k // 32, 16)
    return blocks.astype(np.uint8), scales.astype(np.uint8), values.astype(np.float32)


def written(folder, packed, **change):
    """Write a checkpoint with its experts packed, or as what they stand for in the layout of BF16 files."""
    sizes = {"self_attn.q_proj": (64, H), "self_attn.k_proj": (32, H), "self_attn.v_proj": (32, H), "self_attn.o_proj": (H, 64)}
    shapes = {"model.embed_tokens.weight": (61, H), "model.norm.weight": (H,), "lm_head.weight": (61, H)}
    tensors, mlp = {}, "model.layers.{}.mlp.experts.{}"
    for i in range(2):
        for name, shape in sizes.items():
            shapes |= {f"model.layers.{i}.{name}.weight": shape, f"model.layers.{i}.{name}.bias": shape[:1]}
        for name, shape in {"self_attn.sinks": (4,), "mlp.router.weight": (E, H), "mlp.router.bias": (E,)}.items():
            shapes[f"model.layers.{i}.{name}"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (H,)
        shapes |= {mlp.format(i, "gate_up_proj_bias"): (E, 2 * SIZE), mlp.format(i, "down_proj_bias"): (E, H)}
        for kind, n, k in (("gate_up_proj", 2 * SIZE, H), ("down_proj", H, SIZE)):
            name = mlp.format(i, kind)
            blocks, scales, values = stack(name, n, k)
            stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
            tensors |= stored if packed else {name: values.swapaxes(-1, -2)}
    tensors |= {name: family_files.drawn(name, shape) for name, shape in shapes.items()}
    tensors = {name: value for name, value in (tensors | change).items() if value is not None}
    return tiny.write_checkpoint(folder, PACKED if packed else CONFIG, tensors)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    root = tmp_path_factory.mktemp("native")
    return [mlsd.load(written(root / str(packed), packed), dtype="float32") for packed in (True, False)]


@functools.partial(jax.jit, static_argnums=0)
def apply(network, params, tokens):
    return network(params, tokens, jnp.zeros(1, jnp.int32), None)[0]


def test_packed_experts_mean_what_they_stand_for(both):
    native, plain = both
    leaves = {name for name, leaf in native.params.items() if isinstance(leaf, QuantizedArray)}
    assert leaves == {name for name in plain.params if ".experts." in name and name.endswith("weight")}
    assert {native.params[name].format for name in leaves} == {"mxfp4"}
    found, expected = (apply(model.network, model.params, family_files.tokens()) for model in both)
    assert error(np.asarray(found), np.asarray(expected)) < 1e-5
    assert native.num_parameters == plain.num_parameters
    assert native.network == plain.network


def test_its_twin_s_own_bytes_are_without_the_experts(both):
    native, _ = both
    network, found = native.network, describe(native.folder)
    packed = [name for name, leaf in native.params.items() if isinstance(leaf, QuantizedArray)]
    plain = {name: leaf.size * 2 for name, leaf in native.params.items() if name not in packed}
    part = network.parts_read()
    assert set(found["twins"]) == {"mxfp4"}  # to others packed experts cannot be cast
    own = {name: FORMATS["mxfp4"].nbytes(*native.params[name].shape) for name in plain if network.tensors()[name].linear}
    assert found["twins"]["mxfp4"]["bytes"] == sum(own.values())
    sizes = plain | {name: native.params[name].nbytes for name in packed}
    read = sum(size * part[name] for name, size in sizes.items())
    assert found["pass_bytes"] == round(read)
    drafts = sum(size * part[name] for name, size in (sizes | own).items())
    assert found["twins"]["mxfp4"]["part_of_pass"] == pytest.approx(drafts / read)


@pytest.mark.slow
def test_the_twin_s_experts_are_the_target_s(both):
    """Its other weights are cast; greedy text with it, and with the target itself as drafts, is plain decoding's."""
    native, _ = both
    twin = native.quantized()
    for name, leaf in native.params.items():
        assert (twin.params[name] is leaf) == (not name.endswith("_proj.weight") or ".experts." in name) or name == "lm_head.weight"
    settings = {"max_new_tokens": 8, "stop_token_ids": []}
    plain = mlsd.generate(mlsd.stack(native), [[3, 1, 4], [2]], **settings)
    for draft in (twin, native):
        out = mlsd.generate(mlsd.stack(native, (draft, 3)), [[3, 1, 4], [2]], **settings)
        assert out.tokens == plain.tokens
    assert out.report["levels"][0]["acceptance_rate"] == 1
    alone = mlsd.generate(mlsd.stack(native), [[3, 1, 4]], **settings).report["levels"][0]["experts_per_pass"]
    assert alone == CONFIG["num_experts_per_tok"]
    verified, drafted = (level["experts_per_pass"] for level in out.report["levels"][:2])
    assert alone <= drafted < verified <= E  # of two rows' positions


def test_what_needs_plain_weights_says_so(both, tmp_path):
    native, _ = both
    for ask in (lambda: native.quantized(calibrate=True), lambda: native.quantized(bits=5.0), native.sensitivity):
        with refused("holds weights in MXFP4 already"):
            ask()
    with refused("is in mxfp4 already"):
        native.quantized("int8")
    with refused("holds weights in MXFP4 already", "load it as it is"):
        mlsd.convert(native.folder, tmp_path / "converted", dtype="float32")
    assert describe(native.folder)["weights"] == "plain, those of experts in MXFP4"


def test_damaged_files(tmp_path):
    name = "model.layers.1.mlp.experts.down_proj"
    blocks, scales, _ = stack(name, H, SIZE)
    for i, (change, words) in enumerate(
        [
            ({f"{name}_blocks": None}, (f"missing tensor {name}_blocks",)),
            ({f"{name}_scales": scales[:4]}, (f"{name}_scales has shape [4, 64, 1]", "[5, 64, 1]")),
            ({f"{name}_blocks": blocks.astype(np.float32)}, (f"{name}_blocks is stored as F32", "U8")),
            ({f"{name}_scales": np.full_like(scales, 255)}, (name.replace("down_proj", ""), "no numbers")),
        ]
    ):
        with refused(*words):
            mlsd.load(written(tmp_path / str(i), packed=True, **change), dtype="float32")
    folder = written(tmp_path / "narrow", packed=True)
    (folder / "config.json").write_text(json.dumps(PACKED | {"intermediate_size": 40}))
    with refused("40 elements a row", "a multiple of 32"):
        mlsd.load(folder, dtype="float32")


@pytest.mark.torch
def test_transformers_decodes_the_same():
    torch, mxfp4 = pytest.importorskip("torch"), pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales, values = stack("name", 64, 96)
    found = mxfp4.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    np.testing.assert_array_equal(found.numpy(), values.swapaxes(-1, -2))


def test_the_definition_here_is_the_cast_s():
    blocks, scales, values = stack("name", 64, 96)
    arrays = {"codes": jnp.asarray(blocks.reshape(-1, 48)), "scales": jnp.asarray(scales.reshape(-1, 3))}
    np.testing.assert_array_equal(dequantize(QuantizedArray(arrays, (E * 64, 96), "mxfp4"), jnp.float32), values.reshape(-1, 96))
