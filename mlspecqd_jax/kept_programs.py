"""`Kept`: a jitted function whose compiled programs are kept on disk, and loaded without being traced again.

jax's own cache spares compiling alone, of a program that has been traced and lowered. Here the name of a program is told by what it
depends on (`fingerprints`), and what is found by it is read if nobody else can have written it and if it is whole (`user_cache`):
unpickling it runs what is written there.
"""

import functools
import pickle
import threading
import zlib
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import serialize_executable

from mlspecqd_jax import fingerprints
from mlspecqd_jax.stopwatch import Stopwatch
from mlspecqd_jax.user_cache import cache_folder, read_own, write_own

KIND = "programs"  # of the folder in the user's cache
SLOWEST = "jax_persistent_cache_min_compile_time_secs"
MOST_PROGRAMS = 64  # that a function has at hand; each takes memory, and on Linux some of a process's 65,530 memory regions
MAKING = threading.Lock()  # while a setting of jax is another


class Kept:
    """A jitted function of arrays on one device, of whose programs each is traced and compiled by one process for all later ones.

    What cannot be kept is jitted as ever: a function of several devices, or of values of the caller's own classes.
    """

    def __init__(
        self,
        name: str,
        function: Callable,
        results: Callable[..., Any],
        depends: Callable[..., Any],
        *,
        static: str | None = None,
        **options: Any,
    ):
        """Take what is jitted.

        Args:
          name: of what is kept.
          function: of positional and named arguments.
          results: of the same arguments, a tree of the structure of what the function returns.
          depends: of the same arguments, what a trace depends on beside them; it makes what programs call known to XLA.
          static: the name of a static argument.
          **options: of `jax.jit`.
        """
        self._name, self._results, self._depends, self._static = name, results, depends, static
        self._options = options
        self._jitted = jax.jit(function, static_argnames=static, **options)
        self._programs: dict[Any, Callable] = {}
        self.watch = Stopwatch()  # of what came before the first calls

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        given = {key: value for key, value in named.items() if key != self._static}
        leaves, tree = jax.tree.flatten((arguments, given))
        kinds = tuple((jax.typeof(leaf), getattr(leaf, "committed", None)) for leaf in leaves)
        where = next((leaf.sharding for leaf in leaves if getattr(leaf, "committed", False)), None)
        seen = (named.get(self._static), tree, kinds, where, fingerprints.settings())
        program = self._programs.pop(seen, None)
        if program is None:
            program = self._program(arguments, given, named)
        self._programs[seen] = program  # the last that was used comes last
        while len(self._programs) > MOST_PROGRAMS:
            del self._programs[next(iter(self._programs))]
        return program(*arguments, **given)

    def _program(self, arguments, given, named) -> Callable:
        try:
            name = fingerprints.fingerprint(self._name, (arguments, named), (self._depends(*arguments, **named), self._options))
        except fingerprints.UnknownError:
            return functools.partial(self._jitted, **{key: value for key, value in named.items() if key not in given})
        path = cache_folder(KIND) / f"{self._name}-{name}"
        with self.watch.timing("load"):
            found = read_own(path, name)
            program = None if found is None else self._loaded(found, arguments, given, named)
        return self._made(path, name, arguments, named) if program is None else program

    def _loaded(self, found: bytes, arguments, given, named) -> Callable | None:
        results = jax.tree.structure(self._results(*arguments, **named))
        device = fingerprints.device_of(arguments)
        try:
            return serialize_executable.deserialize_and_load(
                zlib.decompress(found),
                jax.tree.structure((arguments, given)),
                results,
                backend=device.client,
                execution_devices=[device],
            )
        except Exception:  # whatever pickle and XLA raise of what they cannot read
            return None

    def _made(self, path, name, arguments, named) -> Callable:
        with MAKING:
            return self._made_alone(path, name, arguments, named)

    def _made_alone(self, path, name, arguments, named) -> Callable:
        # What jax has read from its own cache cannot be written again: on CPU it lacks its functions.
        slowest = jax.config.values[SLOWEST]
        jax.config.update(SLOWEST, float("inf"))
        try:
            with self.watch.timing("trace"):
                traced = self._jitted.trace(*arguments, **named)
            with self.watch.timing("lower"):
                lowered = traced.lower()
            with self.watch.timing("compile"):
                compiled = lowered.compile()
        finally:
            jax.config.update(SLOWEST, slowest)
        try:
            payload, _, returned = serialize_executable.serialize(compiled)
        except (ValueError, NotImplementedError, pickle.PicklingError, jax.errors.JaxRuntimeError):
            return compiled
        if returned == jax.tree.structure(self._results(*arguments, **named)):
            write_own(path, name, zlib.compress(payload, 1))
        return compiled
