"""Sizes that the tiny checkpoints of families share (`family_files`): odd and unequal ones."""

VOCAB = 61
SIZES = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 640}
# Older files name no padding token, and some classes' default lies beyond a small vocabulary.
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
VISION |= {"patch_size": 14}


def text(model_type: str, **keys) -> dict:
    """Return a config.json of a language model."""
    return {"model_type": model_type} | SIZES | IDS | keys


def with_images(model_type: str, text: dict | None, vision: dict = VISION, **keys) -> dict:
    """Return a config.json of a model that sees images, with a language model in it or around it."""
    within = {} if text is None else {"text_config": text}
    return {"model_type": model_type, "vision_config": vision} | within | keys
