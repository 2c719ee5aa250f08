"""Prompts for the demo checkpoint and for tiny models, and how many tokens to add."""

PROMPTS = ["def fibonacci(n):\n", "import os\n", "class Stack:\n    def push(self, item):\n"]
NEW = 24
IDS = [[1, 2, 3], [4, 5], [6]]  # for models without a tokenizer
