"""
Do the experts differ?
======================

Cosine between every two experts of a layer, ordered by group: red off the diagonal means two experts that do the
same, white that they have nothing in common, blue that they undo each other. Computed between factors, so that no
D×D matrix is formed.
"""

import analysis
from digits import adapted

adapter = analysis.adapter_of(adapted().model)
layer = adapter.layer("1.mlp.fc1")
with analysis.style("notebook"):
    analysis.plots.expert_similarity(analysis.expert_similarity(layer), analysis.groups_of(layer))

# %%
# Over all layers: the mean cosine of every group's experts with those of the other groups. The redder a row, the less
# the groups of that layer differ.

with analysis.style("notebook"):
    analysis.plots.layer_group_similarity(analysis.group_similarity(adapter))
