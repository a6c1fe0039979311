"""
More experts: a power law
=========================

Mean score as the number of experts K·T grows, and the law ``ceiling - a · size ** -b - c`` fitted to one rank of
it. Its band resamples the runs; its flags say what not to read into it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import analysis

runs = pd.read_csv(Path("..") / "results" / "experts.csv")
runs = runs[(runs["method"] == "tucka") & (runs["r"] == 4)]
law = analysis.fit_power_law(runs["experts"], runs["score"], seeds=runs["seed"])
print(law.flags)

# %%
# The curve is that of the runs, the dashed line the law in its band.

with analysis.style("notebook"):
    figure, axes = plt.subplots()
    analysis.plots.expert_scaling(analysis.expert_counts(runs, "r"), ax=axes)
    analysis.plots.fitted_law(law.table().assign(series="r=4"), ax=axes)
