"""
Load over training
==================

The share of the training samples that each group served, from the log of a Trainer with
`tucka.callbacks.BalanceCallback`. Lines near the dashed one are evenly used groups, a line at zero is a dead one: see
`tucka.revive`.
"""

import analysis
from digits import adapted

history = analysis.load_history(adapted().log)
with analysis.style("notebook"):
    analysis.plots.load_over_time(history)

# %%
# The log holds measures of evenness as well.

print({key: round(value, 3) for key, value in adapted().log[-2].items() if key.startswith("load/")})
