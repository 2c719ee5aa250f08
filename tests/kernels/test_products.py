"""Products: which is chosen, what is refused and how, and every one of them, Pallas interpreted, in float64."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import mx_weights
import numpy as np
import pytest

from mlspecqd_jax.weights.cpu_products import CPU_PRODUCTS
from mlspecqd_jax.weights.formats import FORMATS, MX
from mlspecqd_jax.weights.products import OF_STORED
from pallas_kernels import PLAIN, PRODUCTS, best_product, chip_of, why_not
from pallas_kernels.product import reads

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
CHIPS = mx_weights.CHIPS | {product.name: "cpu" for product in CPU_PRODUCTS}
EVERY = (*PRODUCTS, *CPU_PRODUCTS)
MX_NAMES = tuple(format.name for format in MX)
# Products of an MX weight by its definition: those in C++ that round activations have tests of their own, as those for all formats.
OTHERS = ("cpp mxfp4", "cpp mxfp6", "cpp grouped", "tpu table", "tpu table without subnormals", "gpu table")
EXACT = [product for product in EVERY if PLAIN not in (product.formats or ()) and product.name not in OTHERS]
assert {product.name for product in EVERY if PLAIN not in (product.formats or ())} == CHIPS.keys() - {"cpp dense"}


@pytest.mark.parametrize(
    ("chip", "dtype", "product"),
    [
        ("TPU v5 lite", "bfloat16", "tpu"),
        ("TPU v5", "bfloat16", "tpu"),
        ("TPU v6 lite", "bfloat16", "tpu"),
        ("TPU7x", "bfloat16", "tpu"),
        ("TPU v5 lite", "float32", "grouped"),
        ("TPU v4", "bfloat16", "grouped"),
        ("TPU v2", "bfloat16", "grouped"),
        ("sm_90", "bfloat16", "gpu"),
        ("sm_80", "float16", "gpu"),
        ("sm_100", "bfloat16", "gpu"),
        ("sm_90", "float32", "reduced"),
        ("sm_75", "float16", "reduced"),
        ("cpu", "bfloat16", "decoded"),
        ("rocm", "bfloat16", "decoded"),
    ],
)
def test_the_product_chosen(chip, dtype, product):
    assert best_product(chip, dtype, 51, 172).name == product
    assert why_not(product, chip, dtype, 51, 172) is None


@pytest.mark.parametrize("format", [PLAIN, *FORMATS])
def test_every_format_has_a_product_on_every_chip(format):
    for chip in {*CHIPS.values(), "rocm", ""}:
        for dtype in ("bfloat16", "float16", "float32"):
            for products in (PRODUCTS, OF_STORED):
                product = best_product(chip, dtype, 51, 172, format=format, products=products)
                assert reads(product, format)
                assert product.row_multiple(chip, dtype) in (None, 1, 2, 16)


def test_names_are_of_one_product_each():
    assert len({product.name for product in EVERY}) == len(EVERY)


def test_a_chip_is_told_from_its_device():
    def device(platform, kind, **more):
        return types.SimpleNamespace(platform=platform, device_kind=kind, **more)

    assert chip_of(device("tpu", "TPU v5 lite")) == "TPU v5 lite"
    assert chip_of(device("gpu", "NVIDIA H200", compute_capability="9.0")) == "sm_90"
    assert chip_of(device("gpu", "AMD Instinct", compute_capability="gfx942")) == "gpu"
    assert chip_of(jax.devices("cpu")[0]) == "cpu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tpu", "cpu", "bfloat16", 8, 64), ("'tpu'", "[8, 64]", "cpu", "'grouped'")),
        (("tpu", "TPU v4", "bfloat16", 8, 64), ("TPU v4", "v5e")),
        (("tpu", "TPU v5 lite", "float32", 8, 64), ("float32", "bfloat16 alone")),
        (("tpu", "TPU v5 lite", "bfloat16", 8, 2**18), ("[8, 262144]", "131072")),
        (("gpu", "sm_75", "bfloat16", 8, 64), ("sm_75", "8.0", "'reduced'")),
        (("gpu", "sm_90", "float32", 8, 64), ("float32", "float16")),
        (("tpu", "TPU v5 lite", "bfloat16", 8, 96, 1, 4), ("[8, 96]", "4 devices along K", "MX blocks of 32")),
        (("gpu", "sm_90", "bfloat16", 8, 96, 1, 2), ("2 devices along K", "MX blocks of 32")),
        (("grouped", "TPU v3", "bfloat16", 9, 96, 2, 1), ("[9, 96]", "2 devices along N")),
        (("grouped", "sm_90", "bfloat16", 8, 64), ("TPU", "'decoded'")),
        (("reduced", "cpu", "bfloat16", 8, 64), ("NVIDIA", "'decoded'")),
        (("dot", "cpu", "bfloat16", 8, 64), ("an MXFP4 weight", "reads plain alone")),
        (("cuda", "sm_90", "bfloat16", 8, 64), ("'cuda'", "grouped")),
        (("cpp mxfp4", "sm_90", "bfloat16", 8, 64), ("needs a CPU",)),
        (("cpp mxfp4", "cpu", "float32", 8, 64), ("takes bfloat16 alone",)),
        (("cpp mxfp4", "cpu", "bfloat16", 8, 64, 2, 1), ("cannot be split",)),
    ],
)
def test_what_is_refused_and_how(arguments, words):
    reason = why_not(*arguments, products=EVERY if arguments[0].startswith("cpp") else PRODUCTS)
    assert len(reason.splitlines()) == 1
    for word in words:
        assert word in reason


def run(product, x, codes, scales, format="mxfp4", along_k=1):
    """The product of stored arrays, arranged for it; in XLA as one program."""
    reason = why_not(product.name, CHIPS[product.name], x.dtype.name, len(codes), x.shape[1], format=format, products=EVERY)
    if reason is not None:
        pytest.skip(reason)  # no compiler here
    arrays = product.arrange(codes=codes, scales=scales, along_k=along_k, format=FORMATS[format])
    assert {role: array.ndim for role, array in arrays.items()} == {role: len(product.axes[role]) for role in arrays}
    return run_arranged(product, x, arrays, len(codes), format)


def run_arranged(product, x, arrays, n, format="mxfp4"):
    settings = {"n": n, "chip": CHIPS[product.name], "format": FORMATS[format], "interpret": True}
    call = functools.partial(product.run, **settings)
    return np.asarray((call if product.name.startswith(("tpu", "gpu")) else jax.jit(call))(x, arrays))


# What is tried of products whose names begin so. N, K, M and tiles: no multiple of a block, and all the kernels that a product has.
SIZES = {
    "tpu": [
        pytest.param(*size, marks=[slow, exhaustive])
        for size in ((1, 32, 1, 1), (200, 288, 3, 1), (130, 512, 11, 2), (257, 96, 40, 1), (31, 768, 17, 3))
    ],
    "gpu": [*(pytest.param(*size, 1, marks=slow) for size in ((1, 32, 1), (200, 288, 3), (70, 2080, 17), (65, 96, 70)))],
    "": [(1, 32, 1, 1), (50, 288, 3, 1), (50, 288, 40, 1)],
}
DTYPES = {
    "tpu": [("bfloat16",)],
    "gpu": [("bfloat16",), pytest.param("float16", marks=slow)],
    "cpp mx8": [("bfloat16",)],
    "": [("bfloat16",), pytest.param("float16", marks=slow), ("float32",)],
}
FEW_AND_MANY = {"tpu": [(1,), pytest.param(17, marks=slow)], "gpu": [(1,), pytest.param(17, marks=slow)], "": [(16,), (17,)]}
ROWS = {"gpu": [pytest.param(m, marks=slow) for m in (2, 20)], "": [(2,), (4,), (20,)]}
# Fewer and more rows for which a row is the same: any, even numbers, or those that are padded to one.
ALIKE = {
    "tpu": [(1, 8), *(pytest.param(*rows, marks=slow) for rows in ((9, 16), (17, 128)))],
    "gpu": [pytest.param(*rows, marks=slow) for rows in ((1, 8), (1, 16), (9, 16), (17, 64))],
    "cpp": [(1, 2), (3, 17), (16, 64)],
    "decoded": [(2, 4), (6, 20), (16, 64)],
    "": [],  # grouped and reduced are one program at one width, on other chips
}


def cases(*tables):
    """(product, format, what each table says of it): all combinations."""
    found = []
    for product in EXACT:
        of_product = [next(rows for key, rows in table.items() if product.name.startswith(key)) for table in tables]
        rows = [[row if hasattr(row, "marks") else pytest.param(*row) for row in table] for table in of_product]
        for format, *several in itertools.product(product.formats or MX_NAMES, *rows):
            values, marks = ([each for row in several for each in getattr(row, of)] for of in ("values", "marks"))
            name = "-".join(map(str, (product.name, format, *values)))
            found.append(pytest.param(product, format, *values, marks=marks, id=name))
    return found


@pytest.mark.parametrize(("product", "format", "n", "k", "m", "tiles", "dtype"), cases(SIZES, DTYPES))
def test_odd_sizes(product, format, n, k, m, tiles, dtype):
    x, codes, scales = mx_weights.random(n, k, m, jnp.dtype(dtype), format)
    mx_weights.assert_product(run(product, x, codes, scales, format, tiles), x, codes, scales, format)


@pytest.mark.parametrize(("product", "format", "m"), [case for case in cases(FEW_AND_MANY) if case.values[1] == "mxfp4"])
def test_every_code_at_every_scale(product, format, m):
    """Exact; what a product may take for zero is below 2^-111, where it scales in bfloat16, or 2^-124."""
    codes, scales = mx_weights.every_code_at_every_scale()
    coarse = product.name == "gpu" or (product.name == "tpu" and m > 16)
    found = run(product, mx_weights.ones(m, codes), codes, scales, format)
    mx_weights.assert_exact_elements(found, codes, scales, 2.0**-111 if coarse else 2.0**-124)


@pytest.mark.parametrize(("product", "format", "m"), cases(ROWS))
def test_nan_and_infinity_stay_in_their_row(product, format, m):
    mx_weights.assert_not_finite_rows(functools.partial(run, product, format=format), m, format)


@pytest.mark.parametrize(("product", "format", "few", "many"), cases(ALIKE))
def test_a_row_does_not_depend_on_how_many_there_are(product, format, few, many):
    x, codes, scales = mx_weights.random(70, 352, many, format=format)
    whole = run(product, x, codes, scales, format)
    np.testing.assert_array_equal(run(product, x[:few], codes, scales, format), whole[:few])
    multiple = product.row_multiple(CHIPS[product.name], "bfloat16")
    assert multiple == 16 or few % multiple == many % multiple == 0


@pytest.mark.parametrize(
    "product",
    [
        pytest.param(product, id=product.name, marks=slow if product.name.startswith(("gpu", "tpu")) else [])
        for product in PRODUCTS
        if reads(product, "mxfp4")
    ],
)
def test_parts_are_arranged_by_themselves(product):
    """As a mesh of two by three devices would hold them: each part is where the axes say, and the parts along K add up."""
    x, codes, scales = mx_weights.random(2 * 24, 3 * 96, 5)
    arrays = product.arrange(codes=codes, scales=scales, along_n=2, along_k=3, format=FORMATS["mxfp4"])
    parts = {"n": 2, "k": 3, None: 1}

    def part(role, **at):
        found = arrays[role]
        for dimension, axis in enumerate(product.axes[role]):
            found = jnp.split(found, parts[axis], dimension)[at.get(axis, 0)]
        return found

    total = np.zeros((5, 48), np.float32)
    for i in range(2):
        for j in range(3):
            of_part = {role: part(role, n=i, k=j) for role in arrays}
            total[:, 24 * i : 24 * i + 24] += run_arranged(product, x[:, 96 * j : 96 * j + 96], of_part, 24)
    mx_weights.assert_product(total, x, codes, scales)
