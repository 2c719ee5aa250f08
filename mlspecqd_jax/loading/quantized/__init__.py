"""Checkpoints that others quantized: from a folder's tensors to weights as they are stored here."""
