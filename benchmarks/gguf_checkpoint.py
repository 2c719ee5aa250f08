"""Writes a Llama-shaped folder of Hugging Face's layout as the GGUF file that llama.cpp reads, BF16, and that as Q4_0.

python benchmarks/gguf_checkpoint.py FOLDER FILE.gguf

Needs the packages gguf and llama-cpp-python. The vocabulary is numbers: token ids go in and out.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from mlspecqd_jax.loading.gguf.names import gguf_name


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Return q_proj or k_proj with the halves of each head interleaved: GGUF's Llama rotates neighbours, Hugging Face's halves."""
    n, k = w.shape
    return w.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


def write_gguf(folder: Path, out: Path) -> None:
    """Write matrices as BF16 and vectors as f32."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():
                w = tensors.get_tensor(name)
                if w.ndim == 1:
                    writer.add_tensor(gguf_name(name, "llama"), w.astype(np.float32))
                    continue
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    w = interleaved(w, heads if "q_proj" in name else kv_heads)
                raw = np.ascontiguousarray(w).view(np.uint8)
                writer.add_tensor(gguf_name(name, "llama"), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_q4_0(source: Path, out: Path) -> None:
    """Quantize a GGUF file as llama.cpp's own tool does by default: Q4_0, the head Q6_K."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), parameters):
        raise RuntimeError(f"llama.cpp could not quantize {source}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="a new file; the Q4_0 one goes beside it")
    options = parser.parse_args()
    write_gguf(options.folder, options.out)
    write_q4_0(options.out, options.out.with_suffix(".q4_0.gguf"))


if __name__ == "__main__":
    main()
