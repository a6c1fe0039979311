"""Adapters for engines and formats that know no routes: LoRA directories, merged weights, the published checkpoints.

At a fixed route the update of every layer is exactly of rank R, so it is an ordinary LoRA. What is lost is the route:
a LoRA (or a merged weight) has one set of gates for all data.
"""

from .lora import ExportedLora, LoraExport, to_lora
from .measurement import OutputError
from .merging import LayerMerge, MergeReport, merge
from .published import to_published
from .routes import FixedRoute
from .serving import ServingRouter

__all__ = [
    "ExportedLora",
    "FixedRoute",
    "LayerMerge",
    "LoraExport",
    "MergeReport",
    "OutputError",
    "ServingRouter",
    "merge",
    "to_lora",
    "to_published",
]
