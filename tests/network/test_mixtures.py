"""`network.experts`: a mixture against its definition, position by position, and positions that only pad."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlspecqd_jax.network.config import ClampedSwish, Experts, GatedMLP, Router
from mlspecqd_jax.network.experts import Experts as Module
from mlspecqd_jax.network.experts import Share

E, C, K, SIZE, W = 6, 2, 40, 24, 5
PLAIN = Experts(Router(E, C, "softmax", normed=True), SIZE)
PARTS = {
    "plain": PLAIN,
    "shared": dataclasses.replace(PLAIN, shared=GatedMLP(16)),
    "shared by a gate": dataclasses.replace(PLAIN, shared=GatedMLP(16), shared_gate=True),
    "of biases": Experts(Router(E, C, "softmax of chosen", bias=True), SIZE, ClampedSwish(1.5, 0.8), bias=True),
    "weighing what is given": Experts(Router(E, C, "sigmoid of chosen"), SIZE, weighs_input=True),
}


def module_of(part, dtype=jnp.float32):
    """A module all of whose parameters are random."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Module(part, K, init=nnx.initializers.zeros, rngs=nnx.Rngs(0))))
    random = np.random.RandomState(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape) / 4, dtype), state)
    return nnx.merge(graphdef, state)


def swish(x):
    return x / (1 + np.exp(-x))


def expected(part, module, x):
    """The sum over a position's experts, in float64, by a softmax or sigmoids of the logits of the chosen."""

    def value(parameter):
        return np.asarray(parameter.get_value(), np.float64)

    def of_expert(linear, e):
        n = linear.weight.get_value().shape[0] // E
        weight = value(linear.weight)[e * n : (e + 1) * n]
        return weight, 0 if linear.bias is None else value(linear.bias)[e * n : (e + 1) * n]

    def product(linear, e, x):
        weight, bias = of_expert(linear, e)
        return weight @ x + bias

    def act(gate, up):
        if isinstance(part.act, str):
            return swish(gate) * up
        gate, up = np.minimum(gate, part.act.limit), np.clip(up, -part.act.limit, part.act.limit)
        return gate / (1 + np.exp(-part.act.alpha * gate)) * (up + 1)

    logits = value(module.gate.weight) @ x + (0 if module.gate.bias is None else value(module.gate.bias))
    chosen = np.argsort(-logits)[:C]
    powers = np.exp(logits[chosen] - logits[chosen].max())
    factors = 1 / (1 + np.exp(-logits[chosen])) if part.weighs_input else powers / powers.sum()
    total = np.zeros(K)
    for e, factor in zip(chosen, factors, strict=True):
        given, by = (factor * x, 1) if part.weighs_input else (x, factor)
        made = act(product(module.experts.gate_proj, e, given), product(module.experts.up_proj, e, given))
        total += by * product(module.experts.down_proj, e, made)
    if part.shared is not None:
        gate, up, down = (value(getattr(module.shared_expert, f"{name}_proj").weight) for name in ("gate", "up", "down"))
        shared = down @ (swish(gate @ x) * (up @ x))
        total += shared if not part.shared_gate else shared / (1 + np.exp(-value(module.shared_expert_gate.weight) @ x))
    return total


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "shared" else ()) for name in PARTS])
def test_a_mixture_is_its_definition(name):
    module = module_of(PARTS[name])
    x = jax.random.normal(jax.random.key(1), (2, W, K))
    found, read = jax.tree.map(np.asarray, module(x))
    assert read == len(np.unique(module.gate(x, None)[0]))
    for at in np.ndindex(2, W):
        np.testing.assert_allclose(found[at], expected(PARTS[name], module, np.asarray(x[at], np.float64)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_share_of_a_shared_expert_does_not_depend_on_other_positions(dtype):
    """Also without the C++ kernels, where the product of one column would."""
    share = Share(2048, init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    x, run = jax.random.normal(jax.random.key(1), (1, 64, 2048)).astype(dtype), jax.jit(lambda x: share(x))
    whole = np.asarray(run(x))
    for rows in (1, 2, 6, 16):
        np.testing.assert_array_equal(run(x[:, :rows]), whole[:, :rows])


def test_positions_that_only_pad_choose_no_experts():
    """Weights of experts that no other position chose are not read, even if they hold no numbers."""
    module = module_of(PARTS["of biases"], jnp.bfloat16)
    x, used = jax.random.normal(jax.random.key(1), (2, W, K)).astype(jnp.bfloat16), jnp.array([1, 0], jnp.int32)
    experts, _ = module.gate(x, used)
    assert (experts[1:] == -1).all()
    whole = np.asarray(module(x)[0][0, 0])
    for linear in (module.experts.gate_proj, module.experts.up_proj, module.experts.down_proj):
        mine = jnp.isin(jnp.arange(E), experts[0])
        weight = linear.weight.get_value().reshape(E, -1)
        linear.weight.set_value(jnp.where(mine[:, None], weight, jnp.nan).reshape(linear.weight.get_value().shape))
    found, read = module(x, used)
    np.testing.assert_array_equal(np.asarray(found[0, 0]), whole)
    assert read == C
    assert np.isnan(np.asarray(module(x)[0], np.float32)).any()
