"""
Was the rank worth it?
======================

Singular values of each layer's experts on the input side, relative to the largest: a curve that falls early needs
less rank than it was given, one still high at its end could use more.
"""

import analysis
from digits import adapted

adapter = analysis.adapter_of(adapted().model)
with analysis.style("notebook"):
    analysis.plots.spectrum(analysis.layer_spectra(adapter), mode="input", chosen=adapter.config.r)

# %%
# As numbers: the effective rank (the exponential of the entropy of the spectrum), and how many directions hold 90 %
# of the energy.

table = analysis.effective_ranks(adapter)
print(table[table["mode"] == "input"].round(1).to_string(index=False))
