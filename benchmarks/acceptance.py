"""Measures what drafts are accepted on a real checkpoint, and that no stack changes a token of what plain decoding gives.

    python benchmarks/acceptance.py stories260K tinystories_200.json --out benchmarks/results/acceptance-stories260K.json
    python benchmarks/acceptance.py SmolLM2-135M mbpp.jsonl HumanEval.jsonl.gz gsm8k_test.jsonl --number 24 --new-tokens 64 \\
        --choices greedy coupled --out benchmarks/results/acceptance-SmolLM2-135M.json

Prompts come from the files in turn, see prompts.py. All of a run go through in one batch. Counts, not times: the result does not
depend on how busy the machine is.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import jax
import predictions
import prompts as prompt_files
from machine import describe, publish

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import precision_search
from mlspecqd_jax.weights.formats import FORMATS

CHOICES = {"greedy": {}, "coupled": {"temperature": 0.8}, "rejection": {"temperature": 0.8, "rule": "rejection"}}
CALIBRATED = ("mxfp4", "nvfp4", "int4")
BITS = (4.5, 5.5)  # a weight, on average, of formats that are found
HEAD_KEPT = {"lm_head.weight": None}


def variants(model, only: list[str] | None) -> dict[str, tuple[list, dict]]:
    """Return what is measured, or what of it is asked for: name -> (drafters, options of stack)."""
    twin, lookup = functools.cache(model.quantized), mlsd.prompt_lookup()
    found = {f"{name}:6": lambda name=name: [(twin(name), 6)] for name in FORMATS}
    found |= {f"{name}:6, mse": lambda name=name: [(twin(name, scale_rule="mse"), 6)] for name, f in FORMATS.items() if f.bits == 4}
    found |= {f"{name}:6, calibrated": lambda name=name: [(twin(name, calibrate=True), 6)] for name in CALIBRATED}
    found |= {f"auto{bits}:6": lambda bits=bits: [(model.quantized(bits=bits), 6)] for bits in BITS}
    found |= {f"auto{bits}:6, calibrated": lambda bits=bits: [(model.quantized(bits=bits, calibrate=True), 6)] for bits in BITS}
    found |= {f"mxfp4:6, {rule}": lambda rule=rule: [(model.quantized(scale_rule=rule), 6)] for rule in ("ceil", "rceil", "even")}
    found |= {
        "mxfp4:6, lm_head kept": lambda: [(model.quantized(policy=HEAD_KEPT), 6)],
        "mxfp4:6, lm_head too": lambda: [(model.quantized(policy={}), 6)],
        "ngram:6": lambda: [(lookup, 6)],
        "mxfp4:6 ngram:3": lambda: [(twin("mxfp4"), 6), (lookup, 3)],
        "mxfp8_e4m3:6 mxfp4:3": lambda: [(twin("mxfp8_e4m3"), 6), (twin("mxfp4"), 3)],
    }
    every = {name: (drafters, {}) for name, drafters in found.items()}
    for name in ("mxfp4:6", "mxfp4:6 ngram:3", "mxfp8_e4m3:6 mxfp4:3"):
        every[f"{name}, own cache"] = (found[name], {"share_cache": False})
    return {name: (drafters(), how) for name, (drafters, how) in every.items() if not only or name in only}


def named(model):
    """Return the model under its folder's name, since the result should not tell where the folder is."""
    return dataclasses.replace(model, card=dataclasses.replace(model.card, name=Path(model.card.name).name))


def measure(stack, prompts, plain, arguments) -> dict:
    """Return the levels of one run, and whether the tokens are those of plain decoding."""
    out = mlsd.generate(stack, prompts, **arguments)
    return {"levels": out.report["levels"], "equal": None if plain is None else out.tokens == plain.tokens}


def memory(model) -> dict:
    """Return bytes on the device: weights, what the twin adds, caches, and what the compiled loop takes beside its arguments."""
    twin = model.quantized()
    added = {name: leaf for name, leaf in twin.params.items() if leaf is not model.params.get(name)}
    elements = sum(leaf.size for leaf in added.values())
    result = {
        "weights": model.nbytes,
        "twin_adds": sum(leaf.nbytes for leaf in added.values()),
        "bf16_bytes_of_what_is_quantized": 2 * elements,
    }
    for name, (drafters, how) in {
        "plain": ([], {}),
        "mxfp4:6": ([(twin, 6)], {}),
        "mxfp4:6, own cache": ([(twin, 6)], {"share_cache": False}),
    }.items():
        stack = mlsd.stack(model, *drafters, **how)
        batch = mlsd.prepare(stack, [[1, 2, 3]], max_new_tokens=128)
        sampling = mlsd.Sampling.create(1, stack.card.vocab_size)
        state = jax.eval_shape(mlsd.init, stack, batch.tokens, batch.length, sampling)
        program = jax.jit(mlsd.advance, donate_argnames="state").lower(stack, state, batch.limit, sampling, 1).compile()
        caches = [state.cache, getattr(state.below, "cache", None)]
        result[name] = {
            "caches": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches)),
            "temporary": program.memory_analysis().temp_size_in_bytes,
        }
    return result


def written(argv: list[str]) -> str:
    """Return the arguments without where the result goes and where files are."""
    kept = [argument for argument, before in zip(argv, [None, *argv], strict=False) if "--out" not in (argument, before)]
    return " ".join(Path(argument).name if Path(argument).exists() else argument for argument in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or an owner/name id")
    parser.add_argument("prompts", type=Path, nargs="+", help="files of prompts, see prompts.py")
    parser.add_argument("--words", type=int, default=16, help="of each text of a .json file that make its prompt")
    parser.add_argument("--number", type=int, default=100, help="of prompts")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--without", nargs="+", default=[], help="formats that are not to be found, such as the one of the weights")
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    precision_search.ON_CPU = tuple(name for name in precision_search.ON_CPU if name not in options.without)
    runs = []
    for dtype in options.dtypes:
        model = named(mlsd.load(options.model, dtype=dtype))
        prompts = prompt_files.read(options.prompts, options.number, options.words, model.tokenizer)
        chosen = variants(model, options.only)
        for choice in options.choices:
            arguments = {"max_new_tokens": options.new_tokens} | CHOICES[choice]
            plain = mlsd.generate(mlsd.stack(model), prompts, **arguments) if choice != "rejection" else None
            for name, (drafters, how) in chosen.items():
                run = measure(mlsd.stack(model, *drafters, **how), prompts, plain, arguments)
                runs.append({"dtype": dtype, "choice": choice, "stack": name} | run)
                accepted = run["levels"][0]["token_acceptance"]
                print(
                    f"{dtype} {choice} {name}: token acceptance {accepted:.3f}, "
                    f"{predictions.tokens_a_round(run['levels'], len(prompts))} tokens a round (predicted), "
                    f"equal to plain decoding: {run['equal']}",
                    flush=True,
                )
    result = {
        "command": f"python benchmarks/acceptance.py {written(sys.argv[1:])}",
        "prompts": len(prompts),
        "new_tokens": options.new_tokens,
        "memory": memory(mlsd.load(options.model)),
        "runs": runs,
    } | describe()
    publish(result, options.out)


if __name__ == "__main__":
    main()
