"""
Map of the router
=================

Samples by the two leading principal components of their routing features, coloured by the group that serves them,
among the numbered centroids. Clusters of one colour are kinds of data that the router tells apart; the marker is
the domain.
"""

import analysis
from digits import adapted, held_out

observed = analysis.observe(adapted().model, held_out(), labels="domain", progress=False)
mapped = analysis.router_map(observed)
with analysis.style("notebook"):
    analysis.plots.router_map(mapped, labels=observed.labels)
