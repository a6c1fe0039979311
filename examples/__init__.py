"""Examples; the quickstart comes with the wheel as ``python -m tucka.examples.quickstart``."""
