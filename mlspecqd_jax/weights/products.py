"""`multiply`: activations times the transpose of a leaf, by the product that the leaf is arranged for or the best that reads it.

`multiply_experts` is the same of a leaf that holds the weights of several experts, one after another.

Notation: M rows of activations, N outputs, K contracted.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from mlspecqd_jax.weights.cpu_products import CPU_PRODUCTS
from mlspecqd_jax.weights.formats import format_of
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import (
    OF_PLAIN_EXPERTS,
    PLAIN,
    Product,
    best_product,
    chip_in_use,
    each_by_each,
    hit_by_hit,
    named,
    why_not,
)
from pallas_kernels.xla import DECODED, DOT, rows

# Of a leaf that is not arranged for one product: the best that can be had where the program is traced.
OF_STORED = (*CPU_PRODUCTS, DECODED, DOT)


def product_of(w: jax.Array | QuantizedArray, dtype: str, chip: str) -> Product:
    """Return what `multiply` runs on a chip, where it is asked: within a mesh, that is nothing in C++.

    Args:
      w: a leaf.
      dtype: of the activations; a plain weight is used in its own.
      chip: of `pallas_kernels.chip_of`, or a platform; a leaf that is arranged has one product for its own chip.
    """
    leaf = _leaf(w)
    if not leaf.is_stored:
        return named(leaf.product)
    found = best_product(chip, str(getattr(w, "dtype", dtype)), *leaf.shape, format=leaf.format, products=OF_STORED)
    assert found is not None, "the last of these can always be had"
    return found


def multiply(x: jax.Array, w: jax.Array | QuantizedArray, interpret: bool = False, used: jax.Array | None = None) -> jax.Array:
    """x [M, K] times the transpose of a leaf [N, K], f32 [M, N]; under a mesh, each device multiplies its part.

    Args:
      x: activations; a plain weight is used in its own dtype.
      w: the weight.
      interpret: run a Pallas kernel by an interpreter.
      used: int32 [B], how many rows are wanted of each of B windows of M / B rows, from its first on; None is all. What the others
        are is not defined; in C++ they cost nothing.

    Raises:
      NotImplementedError: the product for which w is arranged does not take x; one sentence with the shapes.
    """
    leaf = _leaf(w)
    if "moments" in leaf.arrays:
        x = _watched(x, leaf.arrays["moments"], leaf.arrays["counted"])
    if "order" in leaf.arrays:
        x = x[:, leaf.arrays["order"]]
    y = _multiply_stored(x, leaf, used) if leaf.is_stored else _multiply_arranged(x, leaf, interpret)
    for scale in ("tensor_scale", "row_scale"):
        if scale in leaf.arrays:
            y = y * leaf.arrays[scale][None]
    if "change" in leaf.arrays:
        y = y + leaf.arrays["amount"][:, None] * multiply(x, leaf.arrays["change"], used=used)
    return y


def multiply_experts(
    x: jax.Array, w: jax.Array | QuantizedArray, experts: jax.Array, number: int, interpret: bool = False
) -> jax.Array:
    """Multiply rows by the transposes of the weights of their experts, of which those alone are read that some row chose.

    Args:
      x: [T, C, K], what each row gives to each of the C experts that it chose, or [T, 1, K] where that is the same.
      w: a leaf [E * N, K].
      experts: int32 [T, C], all of a row's different; -1 is none, whose result is not defined, and which costs nothing.
      number: E.
      interpret: run a Pallas kernel by an interpreter.

    Returns:
      f32 [T, C, N].
    """
    leaf = _leaf(w)
    n = leaf.shape[0] // number
    if "moments" in leaf.arrays:
        counted = jnp.repeat(leaf.arrays["counted"], x.shape[1])
        x = _watched(x.reshape(-1, x.shape[-1]), leaf.arrays["moments"], counted).reshape(x.shape)
    y = _multiply_chosen(x, leaf.core, experts, dataclasses.replace(leaf, arrays={}), n, number, interpret)
    if "tensor_scale" in leaf.arrays:
        y = y * leaf.arrays["tensor_scale"][None, None]
    if "row_scale" in leaf.arrays:
        y = y * rows(leaf.arrays["row_scale"].reshape(number, n), jnp.maximum(experts, 0))
    if "change" in leaf.arrays:
        y = y + leaf.arrays["amount"][:, None, None] * multiply_experts(x, leaf.arrays["change"], experts, number)
    return y


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def _multiply_chosen(x, arrays, experts, leaf, n, number, interpret):
    def run(product, x, arrays, experts, chip=leaf.chip):
        if product.by_experts is None:
            return hit_by_hit(x, experts, arrays, functools.partial(_run, product, leaf, n=n), number, n)
        about = {"chip": chip, "format": _format(leaf), "interpret": interpret}
        return product.by_experts(x, experts, arrays, e=number, n=n, **about)

    if not leaf.is_stored:
        product = named(leaf.product)
        return _on_each_device(functools.partial(run, product), leaf, product, x, arrays, experts)
    on_cpu, elsewhere = _product_of_stored(leaf, arrays, x, "cpu"), _product_of_stored(leaf, arrays, x, "")
    otherwise = functools.partial(run, elsewhere)
    forms: dict[str, Callable] = {} if on_cpu is elsewhere else {"cpu": functools.partial(run, on_cpu)}
    chip = chip_in_use()
    kernel = _kernel_of_plain_experts(leaf, arrays, n, chip)
    if kernel is not None:
        of_chip = functools.partial(run, kernel, chip=chip)
        forms["cuda" if chip.startswith("sm_") else "tpu"] = functools.partial(_on_each_device, of_chip, leaf, kernel)
    return jax.lax.platform_dependent(x, arrays, experts, **forms, default=otherwise) if forms else otherwise(x, arrays, experts)


def _kernel_of_plain_experts(leaf, arrays, n, chip):
    """Return the chip's own product with plain weights of experts, of n outputs each, or None: it is not made for a mesh."""
    if leaf.format != PLAIN or jax.sharding.get_abstract_mesh().size > 1:
        return None
    return best_product(chip, arrays["weight"].dtype.name, n, leaf.shape[1], format=PLAIN, products=OF_PLAIN_EXPERTS)


@_multiply_chosen.defjvp
def _(leaf, n, number, interpret, primals, tangents):
    x, arrays, experts = primals
    product = _product_of_stored(leaf, arrays, x, "")

    def form(x, arrays):
        return each_by_each(x, experts, arrays, functools.partial(_run, product, leaf, n=n), number, n)

    return _multiply_chosen(*primals, leaf, n, number, interpret), jax.jvp(form, (x, arrays), tangents[:2])[1]


@jax.custom_vjp
def _watched(x, moments, counted):
    return x


def _add_up(given, cotangent):
    x, counted = given
    x = x.astype(jnp.float32)
    return cotangent, jnp.matmul((x * counted[:, None]).T, x, precision=jax.lax.Precision.HIGHEST), jnp.zeros_like(counted)


_watched.defvjp(lambda x, moments, counted: (x, (x, counted)), _add_up)


def _multiply_stored(x, leaf, used):
    on_cpu, elsewhere = _product_of_stored(leaf, leaf.core, x, "cpu"), _product_of_stored(leaf, leaf.core, x, "")
    otherwise = functools.partial(_run, elsewhere, leaf)
    if on_cpu is elsewhere:
        return otherwise(x, leaf.core, used)
    return jax.lax.platform_dependent(x, leaf.core, used, cpu=functools.partial(_run, on_cpu, leaf), default=otherwise)


def _multiply_arranged(x, leaf, interpret):
    mesh, product = jax.sharding.get_abstract_mesh(), named(leaf.product)
    along_n, along_k = (None, None) if mesh.empty else leaf.spec
    n = leaf.shape[0] // parts_along(mesh, along_n)
    reason = why_not(leaf.product, leaf.chip, x.dtype.name, n, x.shape[1] // parts_along(mesh, along_k), format=leaf.format)
    if reason is not None:
        raise NotImplementedError(reason)
    return _on_each_device(functools.partial(_run, product, leaf, n=n, interpret=interpret), leaf, product, x, leaf.core)


def _on_each_device(run, leaf, product, x, arrays, *more):
    """run(x [..., K], arrays, *more), f32 [..., N]; under a mesh, on each device with its part of the weight."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(x, arrays, *more)
    (along_n, along_k), before = leaf.spec, (None,) * (x.ndim - 1)

    def part(x, arrays, *more):
        y = run(x, arrays, *more)
        return y if along_k is None else jax.lax.psum(y, along_k)

    # A compiler splits no Pallas kernel by itself. Each result is one that it cannot check to be alike on all devices.
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(PartitionSpec(*before, along_k), array_specs(product.axes, leaf.spec, arrays), *(PartitionSpec() for _ in more)),
        out_specs=PartitionSpec(*before, along_n),
        check_vma=False,
    )(x, arrays, *more)


def array_specs(axes: Mapping[str, tuple[str | None, ...]], spec: PartitionSpec, roles: Iterable[str]) -> dict[str, PartitionSpec]:
    """Return how arrays with these roles and axes (`Product.axes`) are split where N and K are split as `spec` says."""
    along = dict(zip(("n", "k"), spec, strict=True)) | {None: None}
    return {role: PartitionSpec(*(along[axis] for axis in axes[role])) for role in roles}


def parts_along(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
    """Return into how many parts an axis of a mesh splits a dimension; None splits nothing."""
    return 1 if axis is None else mesh.shape[axis]


def _leaf(w):
    return w if isinstance(w, QuantizedArray) else QuantizedArray({"weight": w}, w.shape, PLAIN)


def _product_of_stored(leaf, arrays, x, chip):
    return product_of(arrays["weight"] if leaf.format == PLAIN else leaf, x.dtype.name, chip)


def _format(leaf):
    return None if leaf.format == PLAIN else format_of(leaf.format)


def _run(product, leaf, x, arrays, used=None, *, n=None, interpret=False):
    about = {"chip": leaf.chip, "format": _format(leaf), "interpret": interpret, "used": used}
    return product.run(x, arrays, n=n or leaf.shape[0], **about)
