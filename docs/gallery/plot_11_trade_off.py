"""
Score against size
==================

Runs of a sweep (`analysis.sweep`), one row each, as methods and sizes: what lies on the dashed front is not beaten
by anything as small. The runs are those of :doc:`/results/experts`, cut short on purpose; what they say of settings
is said there.
"""

from pathlib import Path

import pandas as pd

import analysis

runs = pd.read_csv(Path("..") / "results" / "experts.csv")
table = analysis.trade_off(runs)
with analysis.style("notebook"):
    analysis.plots.trade_off(table)

# %%
# The front itself:

print(table[table["front"]].drop(columns=["front", "leads"]).round(1).to_string(index=False))
