"""Measures of adapted models, and drawings from the measures: numbers first.

`adapter_of` and `read_adapter` read what an adapter has learnt; the modules `similarity`, `spectra`, `observations`,
`routes`, `parameters` and `tradeoffs` measure it and return arrays and tables; `plots` draws them.
"""

from analysis import plots
from analysis.adapters import Adapter, LayerExperts, RouterWeights, adapter_of, read_adapter
from analysis.observations import Observations, expert_movement, group_movement, observe
from analysis.parameters import METHODS, LayerShape, ParameterCount, count, layer_shapes
from analysis.routes import RouterMap, label_table, load_history, mutual_information, router_map
from analysis.similarity import (
    expert_norms,
    expert_similarity,
    group_similarity,
    groups_of,
    layer_similarity,
    output_cka,
    principal_angles,
    subspace_overlap,
)
from analysis.spectra import effective_rank, effective_ranks, layer_spectra, multilinear_spectra, rank_for_energy
from analysis.styles import style
from analysis.tradeoffs import expert_counts, parameter_scaling, pareto_front, trade_off

__all__ = [
    "METHODS",
    "Adapter",
    "LayerExperts",
    "LayerShape",
    "Observations",
    "ParameterCount",
    "RouterMap",
    "RouterWeights",
    "adapter_of",
    "count",
    "effective_rank",
    "effective_ranks",
    "expert_counts",
    "expert_movement",
    "expert_norms",
    "expert_similarity",
    "group_movement",
    "group_similarity",
    "groups_of",
    "label_table",
    "layer_shapes",
    "layer_similarity",
    "layer_spectra",
    "load_history",
    "multilinear_spectra",
    "mutual_information",
    "observe",
    "output_cka",
    "parameter_scaling",
    "pareto_front",
    "plots",
    "principal_angles",
    "rank_for_energy",
    "read_adapter",
    "router_map",
    "style",
    "subspace_overlap",
    "trade_off",
]
