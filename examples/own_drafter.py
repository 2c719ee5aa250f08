"""A drafter of your own: what most often followed the last token in a text that you have, below the model's MXFP4 twin.

python examples/own_drafter.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import mlspecqd_jax as mlsd


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bigrams:
    """Proposes successor[last token], and what follows that; certain of each (law 1: its distribution is one-hot)."""

    successor: jax.Array  # int32 [V]
    must_follow = False  # it keeps no cache

    def init(self, prompts, prefill_width):
        return None

    def propose(self, state, cache, sequences, sampling, draft_len, wanted, depth, refeed):
        tokens = [jnp.take_along_axis(sequences.tokens, sequences.length[:, None] - 1, axis=1)[:, 0]]  # [B]
        for _ in range(draft_len):
            tokens.append(self.successor[tokens[-1]])
        tokens = jnp.stack(tokens[1:], axis=1)  # [B, G]
        probs = jax.nn.one_hot(tokens, sampling.vocab_size) if sampling.rule == "rejection" else None
        return mlsd.Draft(tokens, probs, wanted), state, cache


def bigrams(ids: list[int], vocab_size: int) -> Bigrams:
    """Count which token follows which; one that never occurs is followed by itself."""
    counts = np.eye(vocab_size, dtype=np.int32)
    np.add.at(counts, (ids[:-1], ids[1:]), 2)
    return Bigrams(jnp.asarray(np.argmax(counts, axis=1), jnp.int32))


def main() -> None:
    model = mlsd.load("demo")
    text = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n"
    drafter = bigrams(model.tokenizer(text * 2)["input_ids"], model.card.vocab_size)
    stack = mlsd.stack(model, (model.quantized(), 6), (drafter, 2))
    out = mlsd.generate(stack, "def mul(a, b):", max_new_tokens=48)
    print(out.text[0])
    for level in out.report["levels"]:
        print(level["name"], level["draft_len"], level["token_acceptance"])
    assert out.tokens == mlsd.generate(mlsd.stack(model), "def mul(a, b):", max_new_tokens=48).tokens


if __name__ == "__main__":
    main()
