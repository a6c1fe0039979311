"""
What it costs
=============

Trained parameters in closed form, without building an adapter: how they grow with the width of the layers, and with
the number of experts.
"""

import analysis
import tucka

config = tucka.TuckAConfig(r=8, k=4, t=2, p=2)
table = analysis.parameter_scaling("width", [256, 512, 1024, 2048, 4096], config=config)
with analysis.style("notebook"):
    analysis.plots.parameter_scaling(table)

# %%
# With the number of experts only the cores grow (R·H for each slice, H the width of its blocks) and the router (Q for
# each centroid). As many separate LoRAs would each bring their own two factors.

table = analysis.parameter_scaling("experts", [8, 16, 32, 64, 128], config=config)
with analysis.style("notebook"):
    analysis.plots.parameter_scaling(table, against="experts")
