"""Measurements of tucka beside PEFT's methods; run from the root of the repository."""
