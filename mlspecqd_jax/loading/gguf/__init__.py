"""GGUF files, which llama.cpp reads: their header, blocks, architectures and tokenizers, as what the rest of `loading` reads."""
