"""The demo family's data: source files to a tokenizer and two token files, prepared once, so that every run sees the same bytes."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from demo_sources import Origin, Source

END_OF_TEXT = "<|endoftext|>"  # id 0; separates documents, begins and ends a text
VALIDATION_PERCENT = 5  # of the files


class Data(NamedTuple):
    """Token streams ready for training."""

    train: np.ndarray  # uint16 [tokens]
    validation: np.ndarray  # uint16 [tokens]
    manifest: dict


def held_out(source: Source) -> bool:
    """Tell whether a document is for validation; its content alone decides."""
    return int(source.sha256[:8], 16) % 100 < VALIDATION_PERCENT


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learn a byte-level BPE; it can spell every text, because all 256 bytes are in its alphabet."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> np.ndarray:
    """Return the texts as one stream of ids, each followed by END_OF_TEXT: uint16 [tokens]."""
    ids = [np.array(e.ids + [0], np.uint16) for e in tokenizer.encode_batch(texts)]
    return np.concatenate(ids) if ids else np.zeros(0, np.uint16)


def prepare(origins: list[Origin], vocab_size: int, folder: Path) -> None:
    """Write tokenizer.json, train.bin, validation.bin and manifest.json; the folder appears complete or not at all."""
    splits = {"train": [], "validation": []}
    for source in (s for origin in origins for s in origin.sources):
        splits["validation" if held_out(source) else "train"].append(source)
    tokenizer = train_tokenizer((s.text for s in splits["train"]), vocab_size)
    partial = fresh_folder(folder)
    tokenizer.save(str(partial / "tokenizer.json"))
    streams = {}
    for split, members in splits.items():
        tokens = encode(tokenizer, [s.text for s in members])
        tokens.tofile(partial / f"{split}.bin")
        size = sum(len(s.text.encode()) for s in members)
        streams[split] = {"files": len(members), "bytes": size, "tokens": len(tokens), "sha256": sha256(tokens)}
    listed = [
        {"name": o.name, "version": o.version, "licence": o.licence, "files": {s.name: s.sha256 for s in o.sources}}
        for o in origins
    ]
    write_json(partial / "manifest.json", {"vocab_size": vocab_size, "streams": streams, "origins": listed})
    partial.rename(folder)


def load_data(folder: Path, vocab_size: int, window: int) -> Data:
    """Map the token files of a prepared folder; both must hold at least one window."""
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"--data {folder} holds no manifest.json; name a folder that this script prepared, or a new one.")
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["vocab_size"] != vocab_size:
        raise ValueError(f"the data in {folder} has a vocabulary of {manifest['vocab_size']}, not {vocab_size}; set --vocab.")
    for split, stream in manifest["streams"].items():
        if stream["tokens"] <= window:
            raise ValueError(f"the {split} files give {stream['tokens']} tokens, too few for a window of {window}.")
    streams = (np.memmap(folder / f"{split}.bin", np.uint16, mode="r") for split in ("train", "validation"))
    return Data(*streams, manifest)


def same_files(manifest: dict, origins: list[Origin]) -> bool:
    """Tell whether prepared data came from these very documents."""
    ours = [digest for origin in manifest["origins"] for digest in origin["files"].values()]
    return sorted(ours) == sorted(s.sha256 for origin in origins for s in origin.sources)


def sha256(tokens: np.ndarray) -> str:
    """Return the hash of a stream's bytes, as its file has them."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()


def windows(tokens: np.ndarray, starts: np.ndarray, window: int) -> np.ndarray:
    """Return the windows at `starts`, each with the token that follows it: int32 [B, W + 1]."""
    return np.stack([tokens[i : i + window + 1] for i in starts]).astype(np.int32)


def fresh_folder(final: Path) -> Path:
    """Return a new empty folder beside `final`, to be renamed to it when complete."""
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_json(path: Path, value) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
