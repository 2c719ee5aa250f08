"""The products of one accelerator: their time, share of the rate at which it reads memory, and error.

Copies of a weight are multiplied in turn, more of them than caches hold.
"""

import functools
import statistics
import time

ROWS = (1, 8, 16, 64)
LAYERS = {  # N x K of the weights of a layer: queries, keys, up, down
    "1B": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "8B, one product for what reads the same x": ((6144, 4096), (28672, 4096)),
    "70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "tiny": ((128, 64), (64, 128)),
}
MIXTURES = {  # experts, how many each position chooses, N and K of a product
    "Qwen3-30B-A3B": (128, 8, 768, 2048),
    "GPT-OSS-20B": (32, 4, 2880, 2880),
    "tiny": (4, 2, 32, 64),
}
IN_TURN = 16  # products of a loop's body, so that what the host does for one round of it is a small part
CACHES = 2**27  # bytes: copies of a weight are more than what caches hold, if `IN_TURN` of them can be


def seconds(call, trials: int) -> dict:
    """Return median, least and greatest time of a call that has been compiled."""
    import jax

    jax.block_until_ready(call())
    taken = []
    for _ in range(trials):
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - began)
    return {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}


def roof(size: int, trials: int) -> float:
    """Return the rate in GB/s at which the device reads `size` bytes."""
    import jax
    import jax.numpy as jnp

    words, repeats = jnp.ones((size // 4,), jnp.int32), 8

    @jax.jit
    def read(words):
        return jax.lax.fori_loop(0, repeats, lambda _, total: jnp.sum(words ^ total), jnp.int32(0))

    return repeats * words.nbytes / seconds(lambda: read(words), trials)["min"] / 1e9


def chained(run, weight, size: int):
    """Return (function that multiplies x by copies of a weight, one product after the other; how many products these are)."""
    import jax

    copies = [jax.tree.map(lambda part: part + 0, weight) for _ in range(min(1 + CACHES // weight.nbytes, IN_TURN))]
    in_turn = [copies[i % len(copies)] for i in range(IN_TURN)]
    repeats = max(1, size // (weight.nbytes * IN_TURN))

    @jax.jit
    def chain(x, in_turn):
        def through(_, x):
            for copy in in_turn:
                x = x + 0 * run(x, copy)[:, :1].astype(x.dtype)
            return x

        return jax.lax.fori_loop(0, repeats, through, x)

    return lambda x: chain(x, in_turn), repeats * IN_TURN


def in_float32(x, w):
    """Return x @ w.T by float32 products."""
    import jax
    import jax.numpy as jnp

    contracted = (((1,), (1,)), ((), ()))
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(x.astype(jnp.float32), w.astype(jnp.float32), contracted, precision=highest)


def kernels(options) -> dict:
    """Return the roof, and what `measured` says of the MXFP4 product and of BF16's at every shape and number of rows."""
    return _at_shapes(options, [(layer, *size) for layer in options.layers for size in LAYERS[layer]], ("mxfp4", None))


def formats(options) -> dict:
    """Return the same of all formats, at the largest weight of the first layer that is asked for."""
    from mlspecqd_jax.weights.formats import FORMATS

    layer = options.layers[0]
    return _at_shapes(options, [(layer, *max(LAYERS[layer], key=lambda size: size[0] * size[1]))], (*FORMATS, None))


def _at_shapes(options, shapes, names) -> dict:
    import jax
    import jax.numpy as jnp

    from mlspecqd_jax.weights import layouts
    from mlspecqd_jax.weights.cast import dequantize, quantize
    from mlspecqd_jax.weights.products import multiply
    from pallas_kernels import best_product, bf16_matmul, chip_of

    rate = roof(options.bytes, options.trials)
    chip, found, left_out, began = chip_of(jax.devices()[0]), [], [], time.perf_counter()
    for layer, n, k in shapes:
        w = (jax.random.normal(jax.random.key(n + k), (n, k)) / k**0.5).astype(jnp.bfloat16)
        for name in names:
            if time.perf_counter() - began > options.budget:
                left_out.append(f"{layer}: {n} x {k}, {name or 'bf16'}")
                continue
            about = {"layer": layer, "n": n, "k": k}
            if name is None:
                found += measured(options, rate, about | {"product": "bf16"}, w, bf16_matmul, w)
                continue
            stored = quantize(w, name)
            product = best_product(chip, "bfloat16", n, k, format=name).name
            leaf = layouts.arrange(stored, product, chip, dtype=jnp.bfloat16)
            decoded = dequantize(stored, jnp.float32)
            found += measured(options, rate, about | {"product": f"{name} ({product})"}, leaf, multiply, decoded)
    return {"read_gb_per_second": rate, "products": found, "left_out": left_out}


def measured(options, rate: float, about: dict, weight, run, decoded) -> list[dict]:
    """Return, for every number of rows, the time, share of the roof and error of run(x, weight)."""
    import jax
    import jax.numpy as jnp

    chain, passes = chained(run, weight, options.bytes)
    run, found = jax.jit(run), []
    for m in options.rows:
        x = jax.random.normal(jax.random.key(m), (m, weight.shape[1])).astype(jnp.bfloat16)
        exact, result = in_float32(x, decoded), run(x, weight)
        took = seconds(functools.partial(chain, x), options.trials)["median"] / passes
        found.append(
            about
            | {
                "rows": m,
                "seconds": took,
                "share_of_roof": weight.nbytes / took / 1e9 / rate,
                "error": float(jnp.max(jnp.abs(result - exact)) / jnp.max(jnp.abs(exact))),
                "first_row_as_alone": bool(jnp.array_equal(result[:1], run(x[:1], weight))),
            }
        )
    return found


def experts(options) -> dict:
    """Return the time of products with experts' weights, by positions, and their share of the roof by the bytes that they need."""
    import jax

    rate = roof(options.bytes, options.trials)
    names = ["tiny"] if options.layers == ["tiny"] else [name for name in MIXTURES if name != "tiny"]
    found, left_out, began = [], [], time.perf_counter()
    for name in names:
        for format in (None, "mxfp4"):
            if time.perf_counter() - began > options.budget:
                left_out.append(f"{name}, {format or 'bf16'}")
                continue
            found += _of_mixture(options, rate, name, format, jax.devices()[0])
    return {"read_gb_per_second": rate, "products": found, "left_out": left_out}


def _of_mixture(options, rate: float, name: str, format: str | None, device) -> list[dict]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mlspecqd_jax.weights import layouts
    from mlspecqd_jax.weights.cast import dequantize, quantize
    from mlspecqd_jax.weights.products import multiply_experts

    number, chosen, n, k = MIXTURES[name]
    w = (jax.random.normal(jax.random.key(n + k), (number * n, k)) / k**0.5).astype(jnp.bfloat16)
    decoded, leaf = w, w
    if format is not None:
        stored = quantize(w, format)
        decoded = dequantize(stored, jnp.float32)
        leaf = layouts.for_device(stored, dtype=jnp.bfloat16, mesh=None, experts=number)
    each = leaf.nbytes / number
    found = []
    for m in options.rows:
        x = jax.random.normal(jax.random.key(m), (m, 1, k)).astype(jnp.bfloat16)
        random, all_of_them = np.random.default_rng(m), np.tile(np.arange(number), (m, 1))
        choices = np.stack([random.permuted(all_of_them, axis=1)[:, :chosen] for _ in range(IN_TURN)])
        repeats = max(1, int(options.bytes // (each * chosen * IN_TURN)))

        @jax.jit
        def chain(x, leaf, choices, repeats=repeats):
            def through(_, x):
                for i in range(IN_TURN):  # other experts each time, so that none of them is in a cache
                    x = x + 0 * multiply_experts(x, leaf, choices[i], number)[:, :1, :1].astype(x.dtype)
                return x

            return jax.lax.fori_loop(0, repeats, through, x)

        choices = jnp.asarray(choices, jnp.int32)
        result = np.asarray(jax.jit(multiply_experts, static_argnums=3)(x, leaf, choices[0], number))
        took = seconds(functools.partial(chain, x, leaf, choices), options.trials)["median"] / (repeats * IN_TURN)
        distinct = float(np.mean([len(np.unique(choice)) for choice in np.asarray(choices)]))
        expert = int(choices[0, 0, 0])
        exact = in_float32(x[0], decoded[expert * n : (expert + 1) * n])[0]
        found.append(
            {
                "mixture": name,
                "n": n,
                "k": k,
                "rows": m,
                "product": format or "bf16",
                "distinct_experts": distinct,
                "seconds": took,
                "share_of_roof": distinct * each / took / 1e9 / rate,
                "error": float(jnp.max(jnp.abs(result[0, 0] - exact)) / jnp.max(jnp.abs(exact))),
            }
        )
    return found
