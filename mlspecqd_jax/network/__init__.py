"""The transformer, and the operations that it is made of."""
