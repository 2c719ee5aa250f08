"""A drafter of your own, below the model's MXFP4 twin: each token's most frequent successor in a text that you have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import mlspecqd_jax as mlsd

TEXT = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bigrams:
    successor: jax.Array  # int32 [V]
    name, must_follow, uses_features = "bigrams", False, False  # it keeps no cache

    def init(self, batch, slots):
        return None

    def feed(self, state, tokens, start, lent):
        return None

    def propose(self, state, ask, sampling):
        tokens = [jnp.take_along_axis(ask.sequences.tokens, ask.sequences.length[:, None] - 1, axis=1)]  # [B, 1]
        for _ in range(ask.draft_len):
            tokens.append(self.successor[tokens[-1]])
        return mlsd.Draft.certain(jnp.concatenate(tokens[1:], axis=1), ask.wanted, sampling), state, ask.lent


model = mlsd.load("demo")
counts, ids = np.eye(model.card.vocab_size, dtype=np.int32), model.tokenizer(TEXT)["input_ids"]
np.add.at(counts, (ids[:-1], ids[1:]), 2)
drafter = Bigrams(jnp.asarray(np.argmax(counts, axis=1), jnp.int32))
stack = mlsd.stack(model, (model.quantized(), 6), (drafter, 2))
print(mlsd.generate(stack, "def mul(a, b):", max_new_tokens=48).text[0])
