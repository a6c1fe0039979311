"""
What the groups learnt
======================

The core of a layer has a slice of R×R numbers for each group and each of the P directions that a group's experts
share: red for positive, blue for negative entries. Columns that look alike are groups that learnt the same.
"""

import analysis
from digits import adapted

adapter = analysis.adapter_of(adapted().model)
layer = adapter.layer("1.mlp.fc1")
print(layer.name, tuple(layer.core.shape))
with analysis.style("notebook"):
    analysis.plots.core_slices(layer.core.numpy())

# %%
# Mixed by the expert factor C, they are the experts between their factors: one row for each of the T experts.

with analysis.style("notebook"):
    analysis.plots.core_slices(layer.slices.numpy(), row="expert")
