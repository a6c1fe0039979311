"""Mutated adapter directories, and what loading them does: ``python -m tests.fuzz --count 20000``."""
