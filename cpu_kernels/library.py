"""The C++ libraries as XLA knows them: what each holds, what of it runs here, and how it is called.

They exist on CPU alone, and where `isas` names an instruction set.
"""

import ctypes
import functools

import jax
import jax.numpy as jnp

from cpu_kernels.build import library_paths

DTYPES = ("bfloat16", "float16", "float32")
OF_ANY_DTYPE = ("matmul", "rms_norm", "layer_norm", "attention", "rotate")  # for each of DTYPES
OF_MX = ("mxfp4_matmul", "mx8_matmul")
# Of scales that are no powers of two.
OF_NUMBERS = ("nvfp4_matmul", "int4_matmul", "uint4_matmul", "int8_matmul", "int8_groups_matmul", "uint8_matmul")
OF_POSITIONS = ("angles", "put_window")
# What each library holds, as `build` names them.
UNITS = {dtype: tuple(f"{product}_{dtype}" for product in OF_ANY_DTYPE) for dtype in DTYPES}
UNITS["bfloat16"] += OF_POSITIONS  # which need no library of their own: most of a small one is XLA's interface
UNITS |= {"mx": OF_MX, "six_bits": ("mxfp6_matmul",), "grouped": OF_NUMBERS}


@functools.cache
def isas(product: str, dtype: str = "bfloat16") -> tuple[str, ...]:
    """Return the instruction sets for which a product is there and which this processor can run, the best first.

    The first call compiles the library if need be; where that cannot be done there are none.
    """
    name = _named(product, dtype)
    library = _library(_unit_of(name))
    if library is None:
        return ()
    names = getattr(library, f"{name}_isas")
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split(","))


def on_cpu(kernel, otherwise, *arguments, dtypes: tuple[str, ...] = DTYPES, unit: str | None = None):
    """Call `kernel` where the program is for one CPU, its library is there and all floats have one of `dtypes`; else `otherwise`.

    An argument may be None.

    XLA cannot split a foreign call over the devices of a mesh; it would gather every operand on each.

    Args:
      unit: what the library is called (UNITS); None for the floats' dtype.
    """
    floats = {array.dtype.name for array in jax.tree.leaves(arguments) if jnp.issubdtype(array.dtype, jnp.floating)}
    if len(floats) != 1 or not floats.issubset(dtypes) or not usable(unit or next(iter(floats))):
        return otherwise(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=kernel, default=otherwise)


def usable(unit: str = "bfloat16") -> bool:
    """Return whether a program that is traced here can call the functions of a unit, which is compiled if need be."""
    return jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty and _library(unit) is not None


def call(product: str, isa: str | None, result: jax.ShapeDtypeStruct, *arguments: jax.Array, **attributes) -> jax.Array:
    """Run a product by the named instruction set, or the best for None; there is one for the first argument's dtype.

    Raises:
      NotImplementedError: this machine lacks it; one sentence with what it has.
    """
    dtype = arguments[0].dtype.name
    here = isas(product, dtype)
    if not here or isa not in (None, *here):
        raise NotImplementedError(f"{product} for {isa or 'any instruction set'}: this machine has {', '.join(here) or 'none'}")
    run = jax.ffi.ffi_call(target(_named(product, dtype)), result, vmap_method="sequential")
    return run(*arguments, isa=isa or "", **attributes)


def _named(product, dtype):
    return f"{product}_{dtype}" if product in OF_ANY_DTYPE else product


def _unit_of(name):
    return next(unit for unit, names in UNITS.items() if name in names)


def target(name: str) -> str:
    """Return what XLA knows a function by, after its library is there; where it cannot be, XLA says that it knows no such name."""
    _library(_unit_of(name))
    return _registered(name)


def _registered(name):
    return f"mlspecqd_{name}"


@functools.cache
def _library(unit):
    paths = library_paths((unit,))
    if paths is None:
        return None
    library = ctypes.CDLL(str(paths[0]))
    for name in UNITS[unit]:
        jax.ffi.register_ffi_target(_registered(name), jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library
