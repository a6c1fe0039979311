"""Drawings of measures: every function takes numbers and axes, and returns the axes, neither shown nor saved.

Without axes a plot makes a figure of its own with a constrained layout. Axes that are given should stand in a figure
with such a layout too (`analysis.style` sets it), for legends, colour bars and long names lie outside the axes.
Groups, slices, experts and layers are numbered from 0, as in `tucka.Route`. What is not finite is drawn grey or left
out, and data without a finite number give axes with the remark "no finite values".
"""

from analysis.plots.flow import label_group_flow
from analysis.plots.laws import fitted_law
from analysis.plots.load import load_over_time
from analysis.plots.movement import activation_movement
from analysis.plots.routing import router_map
from analysis.plots.scaling import expert_scaling, parameter_scaling
from analysis.plots.similarity import expert_similarity, layer_group_similarity
from analysis.plots.slices import core_slices
from analysis.plots.spectra import spectrum
from analysis.plots.tradeoff import trade_off

__all__ = [
    "activation_movement",
    "core_slices",
    "expert_scaling",
    "expert_similarity",
    "fitted_law",
    "label_group_flow",
    "layer_group_similarity",
    "load_over_time",
    "parameter_scaling",
    "router_map",
    "spectrum",
    "trade_off",
]
