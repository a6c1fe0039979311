"""
Smaller after training
======================

`tucka.truncate` re-compresses a trained adapter to lower ranks (HOSVD, then HOOI) and reports the error of every
layer. The error is of the experts as tensors; what it costs is for the task to say, so score what comes out.
"""

import copy

import matplotlib.pyplot as plt

import analysis
import tucka
from digits import accuracy, adapted

model = adapted().model
full = tucka.ranks.adapter_parameters(model)
points = [(full, accuracy(model))]
for rank in (5, 4, 3, 2, 1):
    smaller = copy.deepcopy(model)
    report = tucka.truncate(smaller, ranks=rank)
    points.append((report.parameters, accuracy(smaller)))
print(report)

# %%
# Accuracy against what is left of the parameters, for ranks 6 (as trained) to 1:

with analysis.style("notebook"):
    parameters, scores = zip(*points)
    figure, axes = plt.subplots()
    axes.plot(parameters, scores, marker="o")
    axes.set(xlabel="trainable parameters", ylabel="accuracy on held-out digits (%)")
    axes.set(xlim=(0, None), ylim=(0, 100))
