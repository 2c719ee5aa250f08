"""Drafters without weights of their own."""
