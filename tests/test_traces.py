"""What is compiled: one trace for many requests, and a loop that calls nobody, copies no cache and widens no weight."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlspecqd_jax import api, models, speculation
from mlspecqd_jax.sampling import Sampling
from mlspecqd_jax.transformer import LanguageModel, ModelConfig

# Sizes that no activation shares, so that a weight or a cache is known by its shape.
CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=88,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=12,
    max_position_embeddings=512,
)
PROMPT = [3, 1, 4, 1, 5]


def request(stack, prompt=PROMPT, max_new_tokens=20, **settings):
    """The arguments of `generate_tokens`, as `generate` makes them."""
    batch = api.prepare(stack, [prompt], max_new_tokens=max_new_tokens)
    return batch.tokens, batch.length, batch.limit, Sampling.create(1, CONFIG.vocab_size, **settings)


@pytest.fixture(scope="module")
def stack():
    """The plain stack of a random model in bfloat16."""
    models.enable_compilation_cache()  # what is compiled to be read is not compiled again to be run
    network, rng = LanguageModel(CONFIG), np.random.default_rng(0)
    params = {name: jnp.asarray(0.1 * rng.normal(size=shape), jnp.bfloat16) for name, shape in network.shapes().items()}
    card = models.Card("tiny", CONFIG.vocab_size, CONFIG.max_position_embeddings, None, (5,))
    return api.stack(models.Model(network, params, card, pathlib.Path()))


@pytest.fixture(scope="module")
def programs(stack):
    """Optimized HLO of the decode loop alone and of prefill and loop together."""
    tokens, length, limit, sampling = request(stack)
    state = jax.eval_shape(lambda *arguments: speculation.init(*arguments, prefill_width=16), stack, tokens, length, sampling)
    generate_tokens = jax.jit(speculation.generate_tokens, static_argnames="prefill_width")
    return {
        "advance": api._advance.lower(stack, state, limit, sampling, np.int32(1)).compile().as_text(),
        "generate_tokens": generate_tokens.lower(stack, tokens, length, limit, sampling, prefill_width=16).compile().as_text(),
    }


def computations(hlo):
    """Split a module into its computations, {name: lines}, without the insides of fusions, whose values are never in memory."""
    found, lines = {}, []
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            lines = found.setdefault(header[1], [])
        else:
            lines.append(line)
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.\-]+)", hlo))
    return {name: lines for name, lines in found.items() if name not in fused}


def loop_lines(hlo):
    """All lines of the bodies of while loops and of what these call."""
    found = computations(hlo)
    seen, ahead = [], re.findall(r"body=%?([\w.\-]+)", hlo)
    assert ahead, "no loop in the program"
    while ahead:
        name = ahead.pop()
        if name in found and name not in seen:
            seen.append(name)
            text = "\n".join(found[name])
            ahead += re.findall(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", text)
            ahead += re.findall(r"%([\w.\-]+)", " ".join(re.findall(r"branch_computations=\{([^}]*)\}", text)))
    return [line for name in seen for line in found[name]]


def operations(lines):
    """Yield (opcode, dtype, dimensions without ones) of every array-valued operation."""
    for line in lines:
        match = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(", line)
        if match:
            dtype, dimensions, opcode = match.groups()
            yield opcode, dtype, tuple(int(n) for n in dimensions.split(",") if n not in ("", "1"))


HOST_OPERATIONS = re.compile(
    r" (infeed|outfeed|send|send-done|recv|recv-done)\(|custom_call_target=\"[^\"]*(callback|python)[^\"]*\""
)


@pytest.mark.parametrize("program", ["advance", "generate_tokens"])
def test_nothing_leaves_the_device_within_a_call(programs, program):
    assert not HOST_OPERATIONS.search(programs[program])


def test_a_callback_would_be_seen():
    def spoken(x):
        jax.debug.callback(lambda y: None, x)
        return x + 1

    assert HOST_OPERATIONS.search(jax.jit(spoken).lower(1.0).compile().as_text())


def cache_dimensions(size=256):
    return CONFIG.num_key_value_heads, size, CONFIG.head_dim


def cache_copies(hlo):
    """Copies, also transposed or widened ones, of a whole cache within a loop."""
    cache = sorted(cache_dimensions())
    found = [operation for operation in operations(loop_lines(hlo)) if sorted(operation[2]) == cache]
    return [operation for operation in found if operation[0] in ("copy", "copy-start") or operation[1] == "f32"]


@pytest.mark.parametrize("program", ["advance", "generate_tokens"])
def test_the_loop_copies_no_cache(programs, program):
    assert not cache_copies(programs[program])


def test_a_copy_of_a_cache_would_be_seen():
    """A loop that swaps two caches has to copy."""
    caches = [jnp.zeros((1, *cache_dimensions()), jnp.bfloat16)] * 2

    def body(carry):
        i, a, b = carry
        return i + 1, b, a.at[0, 0, i].set(b[0, 1, i])

    swap = jax.jit(lambda a, b: jax.lax.while_loop(lambda carry: carry[0] < 9, body, (0, a, b)))
    assert cache_copies(swap.lower(*caches).compile().as_text())


def test_the_donated_caches_are_updated_where_they_are(programs):
    hlo = programs["advance"]
    layout = re.search(r"entry_computation_layout=\{\((.*?)\)->", hlo)[1]
    parameters = re.findall(r"(\w+)\[([\d,]*)\]", layout)
    cache = ("bf16", ",".join(map(str, (1, *cache_dimensions()))))
    caches = {i for i, parameter in enumerate(parameters) if parameter == cache}
    assert len(caches) == 2 * CONFIG.num_hidden_layers
    aliases = re.search(r"input_output_alias=\{(.*?\)) \}", hlo)[1]
    assert caches <= {int(i) for i in re.findall(r": \((\d+),", aliases)}


def widened_weights(hlo):
    """f32 arrays of a weight's shape, anywhere in the program."""
    shapes = {shape for shape in LanguageModel(CONFIG).shapes().values() if len(shape) == 2}
    shapes |= {shape[::-1] for shape in shapes}
    lines = [line for lines in computations(hlo).values() for line in lines]
    return [operation for operation in operations(lines) if operation[1] == "f32" and operation[2] in shapes]


@pytest.mark.parametrize("program", ["advance", "generate_tokens"])
def test_no_weight_is_widened(programs, program):
    assert not widened_weights(programs[program])


def test_a_widened_weight_would_be_seen():
    """A product in f32 widens its 16-bit weight, once, outside of the loop."""
    weight = jnp.zeros((CONFIG.intermediate_size, CONFIG.hidden_size), jnp.bfloat16)

    def multiply(weight, n):
        def body(carry):
            i, x = carry
            return i + 1, (x @ weight.astype(jnp.float32).T) @ jnp.ones((CONFIG.intermediate_size, CONFIG.hidden_size)) + i

        return jax.lax.while_loop(lambda carry: carry[0] < n, body, (0, jnp.zeros((2, CONFIG.hidden_size))))

    assert widened_weights(jax.jit(multiply).lower(weight, 9).compile().as_text())


REQUESTS = [
    {"prompt": [7, 8]},
    {"prompt": list(range(16)), "max_new_tokens": 3},
    {"max_new_tokens": 25},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.5, "min_p": 0.1},
    {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.3},
    {"temperature": 1, "seed": 123},
    {"stop_token_ids": [1, 2, 3, 4, 5, 6, 7]},
]


def test_generate_tokens_traces_once_for_many_requests(stack):
    traces = []

    @jax.jit
    def counted(*arguments):
        traces.append(1)
        return speculation.generate_tokens(*arguments)

    for settings in REQUESTS:
        jax.eval_shape(counted, stack, *request(stack, **settings))
    assert len(traces) == 1
    # What is static does make a trace, so the counter counts.
    for settings in ({"rule": "rejection"}, {"logprobs": True}, {"max_new_tokens": 300}, {"stop_token_ids": range(9)}):
        jax.eval_shape(counted, stack, *request(stack, **settings))
    assert len(traces) == 5


def test_generate_traces_once_for_many_requests(stack):
    before = api._init._cache_size(), api._advance._cache_size()
    for settings in REQUESTS:
        arguments = {"max_new_tokens": 20} | settings
        out = api.generate(stack, [arguments.pop("prompt", PROMPT)], **arguments)
        assert 1 <= len(out.tokens[0]) <= 25
    assert (api._init._cache_size(), api._advance._cache_size()) == (before[0] + 1, before[1] + 1)
