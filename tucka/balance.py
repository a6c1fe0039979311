"""Auxiliary-loss-free balancing of the groups: a bias on the choice, moved against the load."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_step(
    group: Tensor,  # (N,) chosen group of every routed unit
    groups: int,
    rate: float,
) -> Tensor:  # (K,)
    """Change of every group's bias after one training forward: γ (1 − K · load).

    For a single routed unit that is −γ(K−1) for the chosen group and +γ for the others (TuckA, arXiv 2511.06859,
    load-balancing baseline); with several units the load is the share of units that chose the group.
    """
    counts_K = torch.zeros(groups, device=group.device).index_add_(
        0, group, torch.ones(group.shape, device=group.device)
    )
    return rate * (1 - groups * counts_K / max(group.shape[0], 1))
