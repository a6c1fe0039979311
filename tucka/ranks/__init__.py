"""Ranks and expert counts: chosen before training, lowered during it, changed after it.

`tucka.ranks.schedule` (a callback of the Trainer) is imported by who uses it.
"""

from .expansion import Expansion, expand
from .families import adapter_parameters
from .measurement import LayerSpectrum, Spectra, spectra
from .penalty import lasso_penalty
from .pruning import Pruning, prune
from .suggestion import suggest_ranks
from .truncation import LayerTruncation, Truncation, truncate

__all__ = [
    "Expansion",
    "LayerSpectrum",
    "LayerTruncation",
    "Pruning",
    "Spectra",
    "Truncation",
    "adapter_parameters",
    "expand",
    "lasso_penalty",
    "prune",
    "spectra",
    "suggest_ranks",
    "truncate",
]
