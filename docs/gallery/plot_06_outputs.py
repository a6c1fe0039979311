"""
Do their outputs differ?
========================

Experts may differ as matrices and still do the same to the data at hand. Linear CKA compares what they put out: 1
is the same up to rotation and scale, 0 has nothing in common.
"""

import analysis
from digits import adapted, held_out

observed = analysis.observe(adapted().model, held_out(), progress=False)
layer = observed.adapter.layer("1.mlp.fc1")
cka = analysis.output_cka(layer, observed.layers[layer.name].covariance)
with analysis.style("notebook"):
    analysis.plots.expert_similarity(cka, analysis.groups_of(layer), measure="cka")
