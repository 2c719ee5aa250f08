"""`multiply`: activations times the transpose of a leaf, by the product that the leaf is arranged for or the best that reads it.

`multiply_experts` is the same of a leaf that holds the weights of several experts, one after another.

Notation: M rows of activations, N outputs, K contracted.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from mlspecqd_jax.weights.cpu_products import CPU_PRODUCTS
from mlspecqd_jax.weights.formats import format_of
from mlspecqd_jax.weights.quantized_array import QuantizedArray
from pallas_kernels import PLAIN, Product, best_product, each_by_each, hit_by_hit, named, why_not
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


def multiply_experts(x: jax.Array, w: jax.Array | QuantizedArray, experts: jax.Array, number: int) -> jax.Array:
    """Multiply rows by the transposes of the weights of their experts, of which those alone are read that some row chose.

    Args:
      x: [T, C, K], what each row gives to each of the C experts that it chose, or [T, 1, K] where that is the same.
      w: a leaf [E * N, K], which is a plain weight or as it is stored.
      experts: int32 [T, C], all of a row's different; -1 is none, whose result is not defined, and in C++ costs nothing.
      number: E.

    Returns:
      f32 [T, C, N].
    """
    leaf = _leaf(w)
    n = leaf.shape[0] // number
    if "moments" in leaf.arrays:
        counted = jnp.repeat(leaf.arrays["counted"], x.shape[1])
        x = _watched(x.reshape(-1, x.shape[-1]), leaf.arrays["moments"], counted).reshape(x.shape)
    y = _multiply_chosen(x, leaf.core, experts, dataclasses.replace(leaf, arrays={}), n, number)
    if "tensor_scale" in leaf.arrays:
        y = y * leaf.arrays["tensor_scale"][None, None]
    if "row_scale" in leaf.arrays:
        y = y * rows(leaf.arrays["row_scale"].reshape(number, n), jnp.maximum(experts, 0))
    if "change" in leaf.arrays:
        y = y + leaf.arrays["amount"][:, None, None] * multiply_experts(x, leaf.arrays["change"], experts, number)
    return y


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _multiply_chosen(x, arrays, experts, leaf, n, number):
    on_cpu, elsewhere = _product_of_stored(leaf, arrays, x, "cpu"), _product_of_stored(leaf, arrays, x, "")

    def run(product, x, arrays, experts):
        if not product.by_experts:
            return hit_by_hit(x, experts, arrays, functools.partial(_run, product, leaf, n=n), number, n)
        x = jnp.broadcast_to(x, (*experts.shape, x.shape[-1])).reshape(-1, x.shape[-1])
        return _run(product, leaf, x, arrays, n=n, experts=experts.reshape(-1)).reshape(*experts.shape, n)

    otherwise = functools.partial(run, elsewhere)
    if on_cpu is elsewhere:
        return otherwise(x, arrays, experts)
    return jax.lax.platform_dependent(x, arrays, experts, cpu=functools.partial(run, on_cpu), default=otherwise)


@_multiply_chosen.defjvp
def _(leaf, n, number, primals, tangents):
    x, arrays, experts = primals
    product = _product_of_stored(leaf, arrays, x, "")

    def form(x, arrays):
        return each_by_each(x, experts, arrays, functools.partial(_run, product, leaf, n=n), number, n)

    return _multiply_chosen(*primals, leaf, n, number), jax.jvp(form, (x, arrays), tangents[:2])[1]


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
    run = functools.partial(_run, product, leaf, n=n, interpret=interpret)
    if mesh.empty:
        return run(x, leaf.core)

    def part(x, arrays):
        y = run(x, arrays)
        return y if along_k is None else jax.lax.psum(y, along_k)

    # A compiler splits no Pallas kernel by itself. Each result is one that it cannot check to be alike on all devices.
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(PartitionSpec(None, along_k), array_specs(product.axes, leaf.spec, leaf.core)),
        out_specs=PartitionSpec(None, along_n),
        check_vma=False,
    )(x, leaf.core)


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


def _run(product, leaf, x, arrays, used=None, *, n=None, interpret=False, experts=None):
    format = None if leaf.format == PLAIN else format_of(leaf.format)
    more = {} if experts is None else {"experts": experts}
    return product.run(x, arrays, n=n or leaf.shape[0], chip=leaf.chip, format=format, interpret=interpret, used=used, **more)
