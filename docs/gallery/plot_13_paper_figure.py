"""
A figure for a paper
====================

`analysis.style` sets fonts, line widths and the width of a venue's text or column; colours survive colour blindness
and grey printing, and text stays text in the file. Every plot takes axes, so panels go side by side.
"""

import matplotlib.pyplot as plt

import analysis
from digits import adapted, held_out

observed = analysis.observe(adapted().model, held_out(), labels="domain", progress=False)
layer = observed.adapter.layer("1.mlp.fc1")
with analysis.style("paper", width="icml"):
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.75, 2.6), width_ratios=[1.3, 1])
    analysis.plots.router_map(analysis.router_map(observed), ax=left)
    analysis.plots.expert_similarity(analysis.expert_similarity(layer), analysis.groups_of(layer), ax=right)
    # figure.savefig("routes.pdf") inside the block: fonts and format are set when a figure is saved
