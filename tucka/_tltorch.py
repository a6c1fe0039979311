"""Imports tensorly-torch without its side effect: importing it switches tensorly's global backend to PyTorch."""

import tensorly as tl

_backend = tl.get_backend()

from tltorch import TuckerTensor  # noqa: E402

tl.set_backend(_backend)

__all__ = ["TuckerTensor"]
