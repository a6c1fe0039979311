"""Measures of adapted models, and drawings from the measures: numbers first.

`adapter_of` and `read_adapter` read what an adapter has learnt; the modules `similarity`, `spectra`, `observations`,
`routes`, `parameters` and `tradeoffs` measure it and return arrays and tables; `plots` draws them. `sweep` runs a
grid of settings and seeds into a table, and `scaling` fits laws to it.
"""

from analysis import plots
from analysis.adapters import Adapter, LayerExperts, RouterWeights, adapter_of, read_adapter
from analysis.observations import Observations, expert_movement, group_movement, observe
from analysis.parameters import METHODS, LayerShape, ParameterCount, count, layer_shapes
from analysis.routes import RouterMap, label_table, load_history, mutual_information, router_map
from analysis.scaling import BreakEven, PowerLaw, break_even, fit_laws, fit_power_law, law_table
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
from analysis.sweeps import sweep
from analysis.tradeoffs import expert_counts, parameter_scaling, pareto_front, trade_off

__all__ = [
    "METHODS",
    "Adapter",
    "BreakEven",
    "LayerExperts",
    "LayerShape",
    "Observations",
    "ParameterCount",
    "PowerLaw",
    "RouterMap",
    "RouterWeights",
    "adapter_of",
    "break_even",
    "count",
    "effective_rank",
    "effective_ranks",
    "expert_counts",
    "expert_movement",
    "expert_norms",
    "expert_similarity",
    "fit_laws",
    "fit_power_law",
    "group_movement",
    "group_similarity",
    "groups_of",
    "label_table",
    "law_table",
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
    "sweep",
    "trade_off",
]
