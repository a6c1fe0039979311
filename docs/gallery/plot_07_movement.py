"""
Where the adaptation acts
=========================

How far each group's experts move a layer's activations, as a share of their length. High points are layers that the
adaptation relies on; a layer near zero could do with a lower rank, or without an adapter.
"""

import analysis
from digits import adapted, held_out

observed = analysis.observe(adapted().model, held_out(), progress=False)
with analysis.style("notebook"):
    analysis.plots.activation_movement(analysis.expert_movement(observed))

# %%
# With the shared slice, which is always active, and as a table:

table = analysis.group_movement(observed)
print(table.pivot(index="layer", columns="group", values="movement").round(2))
