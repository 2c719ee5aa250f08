"""Generation inside your own `jax.jit`: sample several continuations, keep the likeliest, never leaving the device.

    python examples/jit_generate.py
    python examples/jit_generate.py --model path/to/model --prompt "class Stack:" --samples 8

`init`, `step`, `advance` and `generate_tokens` are pure functions of pytrees. The stack carries the weights as its leaves, so it is
an argument like any other, and another seed, temperature or length is not another compilation.
"""

import argparse
import functools

import jax
import jax.numpy as jnp

import mlspecqd_jax as mlsd


def likeliest(stack, tokens, length, limit, sampling):
    """Continue every row and return the row whose new tokens have the highest mean log-probability.

    Args:
      stack: from `mlsd.stack`.
      tokens: int32 [B, S], the same prompt in every row.
      length, limit: int32 [B].
      sampling: made with logprobs=True.

    Returns:
      (tokens [S], length, mean log-probability).
    """
    tokens, end, state = mlsd.generate_tokens(stack, tokens, length, limit, sampling)
    slots = jnp.arange(tokens.shape[1])[None, :]
    new = (slots >= length[:, None]) & (slots < end[:, None])
    mean = jnp.mean(state.logprobs, axis=1, where=new)
    best = jnp.argmax(mean)
    return tokens[best], end[best], mean[best]


def four_rounds(stack, state, limit, sampling):
    """Run four rounds by hand: `step` is the body of the loop, for scripts that look at the state in between."""
    return jax.lax.fori_loop(0, 4, lambda _, state: mlsd.step(stack, state, limit, sampling), state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt", default="def fibonacci(n):")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--draft-len", type=int, default=4, help="of the model's MXFP4 twin; 0 decodes plainly")
    options = parser.parse_args()

    model = mlsd.load(options.model)
    stack = mlsd.stack(model, (model.quantized(), options.draft_len)) if options.draft_len else mlsd.stack(model)
    tokenizer = stack.card.tokenizer
    batch = mlsd.prepare(stack, [options.prompt] * options.samples, max_new_tokens=options.max_new_tokens)

    def sampling(seed):
        return mlsd.Sampling.create(
            options.samples,
            stack.card.vocab_size,
            temperature=0.8,
            seed=seed,
            stop_token_ids=stack.card.eos_token_ids,
            logprobs=True,
        )

    # The options make drafts exact on GPUs too; elsewhere there are none.
    jit = functools.partial(jax.jit, compiler_options=mlsd.compiler_options(stack))
    sample = jit(likeliest)
    for seed in (0, 100):
        tokens, end, mean = sample(stack, batch.tokens, batch.length, batch.limit, sampling(seed))
        print(f"--- seeds from {seed}: mean log-probability {mean:.3f}")
        print(tokenizer.decode(tokens[:end].tolist(), skip_special_tokens=True))
    print(f"compiled {sample._cache_size()} time(s) for 2 calls")

    state = jit(mlsd.init)(stack, batch.tokens, batch.length, sampling(0))
    state = jit(four_rounds)(stack, state, batch.limit, sampling(0))
    print(f"--- row 0 after four rounds: {tokenizer.decode(state.tokens[0, : state.length[0]].tolist())!r}")
    state = jit(mlsd.advance)(stack, state, batch.limit, sampling(0))
    print(f"--- and resumed to its end: {int(state.length[0] - batch.length[0])} new tokens")


if __name__ == "__main__":
    main()
