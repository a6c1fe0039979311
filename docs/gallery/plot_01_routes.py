"""
Who is routed where
===================

A route is taken for every forward of the model. `tucka.record_routes` fills a list with them; here they are set against
the domains, of which the router was told nothing.
"""

import pandas as pd
import torch

import analysis
import tucka
from digits import accuracy, adapted, held_out

base, model, log = adapted()
print(f"accuracy before adaptation: {accuracy(base):.1f} %, now: {accuracy(model):.1f} %")

# %%
# One `tucka.Route` per forward: the group of every sample, the gates of the experts in that group, and all scores.

batches = held_out()
with tucka.record_routes(model) as routes, torch.no_grad():
    for batch in batches:
        model(batch["pixel_values"])
print(routes[0].group[:16], routes[0].gates.shape, routes[0].scores.shape)

# %%
# `analysis.observe` does that, and more, over an iterable of batches. A label whose band stays whole is served by one
# group.

observed = analysis.observe(model, batches, labels="domain", progress=False)
table = analysis.label_table(observed.routing[""].group, observed.labels, count=4)
with analysis.style("notebook"):
    analysis.plots.label_group_flow(table)

# %%
# The same as numbers: shares in percent, and how much a group tells of the domain.

print((100 * table.div(table.sum(axis=1), axis=0)).round())
print(pd.Series(analysis.mutual_information(table)).round(2))
