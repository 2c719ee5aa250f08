"""A mixture of experts: a feed-forward part with many MLPs, of which each position is given to a few.

The weights of one product are those of all experts one after another, [E * N, K]: one parameter, cast and stored like any other.

Notation: B batch, W window, T = B W positions, K hidden size, N outputs, E experts, C chosen for each position.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mlspecqd_jax.folds import ordered_sum
from mlspecqd_jax.network import config
from mlspecqd_jax.network.layers import ALONG_K, GatedMLP, gated, norm_of
from mlspecqd_jax.network.ops import expert_linear, linear, product, rows
from mlspecqd_jax.network.routing import route
from pallas_kernels import hits

NORMS = ("norm", "after_norm", "shared_norm", "after_shared_norm")  # of `config.Experts.norms`, by its name of each


class ExpertLinear(nnx.Module):
    """x @ weight_e.T + bias_e for each expert e that a position chose, with weight [E * N, K] and bias [E * N].

    A device of a mesh holds a part along K of all experts, since a position may choose any of them.
    """

    def __init__(self, e: int, n: int, k: int, *, bias: bool, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (e * n, k)), axes=ALONG_K, linear=True, experts=e)
        self.bias = nnx.Param(jnp.zeros((e * n,))) if bias else None
        self.experts = e

    def __call__(self, x: jax.Array, experts: jax.Array) -> jax.Array:
        """Return [T, C, N] of x [T, C, K] or [T, 1, K] and experts int32 [T, C]."""
        y = expert_linear(x, self.weight.get_value(), experts, self.experts)
        if self.bias is None:
            return y
        bias = self.bias.get_value().reshape(self.experts, -1)
        return y + rows(bias, jnp.maximum(experts, 0)).astype(y.dtype)


class Router(nnx.Module):
    """`routing.route` of scale * x @ weight.T + bias, x perhaps normed, with weight [E, K], which no twin casts."""

    def __init__(self, router: config.Router, k: int, *, init, rngs: nnx.Rngs):
        self.router = router
        self.norm = None if router.input_norm is None else norm_of(k, router.input_norm)
        self.expert_factors = nnx.Param(jnp.ones((router.experts,))) if router.expert_factors else None
        self.weight = nnx.Param(init(rngs.params(), (router.experts, k)))
        self.bias = nnx.Param(jnp.zeros((router.experts,))) if router.bias else None
        # Of larger magnitude than scores are, so that bfloat16 would take them for equal.
        added = nnx.Param(jnp.zeros((router.experts,)), dtype="float32") if router.choice_bias else None
        self.e_score_correction_bias = added

    def __call__(self, x: jax.Array, used: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Return (experts int32 [T, C], factors f32 [T, C]) of x [B, W, K]; positions that are not in use have the expert -1."""
        x = x if self.norm is None else self.norm(x, used)
        logits = linear(x, self.weight.get_value(), used=used, out_dtype=jnp.float32).reshape(-1, self.router.experts)
        logits = logits if self.router.scale == 1 else logits * self.router.scale
        if self.bias is not None:
            logits = logits + self.bias.get_value().astype(jnp.float32)[None]
        added = self.e_score_correction_bias
        experts, factors = route(logits, None if added is None else added.get_value().astype(jnp.float32), self.router)
        if self.expert_factors is not None:
            factors = factors * self.expert_factors.get_value().astype(jnp.float32)[experts]
        if used is None:
            return experts, factors
        in_use = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < used[:, None]
        return jnp.where(in_use.reshape(-1, 1), experts, -1), factors


class ExpertMLPs(nnx.Module):
    """down(act(gate(x)) * up(x)) of each expert that a position chose."""

    def __init__(self, mlp: config.Experts, k: int, *, init, rngs: nnx.Rngs):
        make = functools.partial(ExpertLinear, mlp.router.experts, bias=mlp.bias, init=init, rngs=rngs)
        self.gate_proj = make(mlp.size, k)
        self.up_proj = make(mlp.size, k)
        self.down_proj = make(k, mlp.size)
        self.gated = gated(mlp.act)

    def __call__(self, x: jax.Array, experts: jax.Array) -> jax.Array:
        """Return [T, C, K], as `ExpertLinear` takes its arguments."""
        return self.down_proj(self.gated(self.gate_proj(x, experts), self.up_proj(x, experts)), experts)


class Share(nnx.Module):
    """sigmoid(x @ weight.T), one number for each position, with weight [1, K], which no twin casts.

    Not by `linear`: XLA:CPU adds up a product of one column otherwise for other numbers of rows.
    """

    def __init__(self, k: int, *, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (1, k)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., 1] in x's dtype of x [..., K]."""
        weight = self.weight.get_value().astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        total = ordered_sum(product(x.astype(jnp.float32), weight))
        return jax.nn.sigmoid(total)[..., None].astype(x.dtype)


class Experts(nnx.Module):
    """The sum of what a position's experts make of it, each times its factor, and of what a shared MLP does (`config.Experts`)."""

    def __init__(self, mlp: config.Experts, k: int, *, init, rngs: nnx.Rngs):
        self.mlp = mlp
        self.gate = Router(mlp.router, k, init=init, rngs=rngs)
        self.experts = ExpertMLPs(mlp, k, init=init, rngs=rngs)
        self.shared_expert = None if mlp.shared is None else GatedMLP(mlp.shared, k, init=init, rngs=rngs)
        self.shared_expert_gate = Share(k, init=init, rngs=rngs) if mlp.shared_gate else None
        if mlp.norms is not None:
            for name in NORMS:
                setattr(self, name, norm_of(k, mlp.norms))

    def __call__(self, x: jax.Array, used: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Return (that of x [B, W, K], how many different experts the positions chose, int32 [])."""
        experts, factors = self.gate(x, used)
        read = hits(experts, self.mlp.router.experts).count
        before, after, before_shared, after_shared = (getattr(self, name, _identity) for name in NORMS)
        given = before(x, used).reshape(-1, 1, x.shape[-1])
        if self.mlp.weighs_input:
            given = product(given, factors[..., None].astype(x.dtype))
        y = self.experts(given, experts)
        y = _sum(y if self.mlp.weighs_input else product(y.astype(jnp.float32), factors[..., None])).astype(x.dtype)
        y = after(y.reshape(x.shape), used)
        if self.shared_expert is None:
            return y, read
        shared = after_shared(self.shared_expert(before_shared(x, used), used), used)
        if self.shared_expert_gate is not None:
            shared = product(shared, self.shared_expert_gate(x))
        return y + shared, read


def _identity(x, used):
    return x


def _sum(y):
    """The sum over C of y [T, C, K], in f32: a position's best expert first, whatever the other positions chose."""
    y = y.astype(jnp.float32)
    total = y[:, 0]
    for i in range(1, y.shape[1]):
        total = total + y[:, i]
    return total
