"""Starts: what experts hold before training, and centroids made of routing features.

Shape legend: N features, F their length, K groups, T experts in a group, P and R ranks (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .clustering import SLACK, nested_kmeans
from .config import TuckAConfig
from .hosvd import Decomposition
from .ops import choose_group, diagonal_blocks
from .routing import Router
from .tensors import ExpertTensor

EXPERT_STARTS: dict[str, Callable[[ExpertTensor], ExpertTensor]] = {
    "identity": ExpertTensor.identity_,
    "kaiming": ExpertTensor.kaiming_,
    "hosvd": ExpertTensor.identity_,  # until calibration
    "gradient": ExpertTensor.identity_,  # until calibration
}
"""What new experts hold, by `TuckAConfig.init_experts`."""

DATA_STARTS = {"hosvd": 1.0, "gradient": -1.0}
"""Starts from a tensor of the data, and the sign of a warm start: against the gradient."""

CENTROID_ENTRY = 10.0
"""Root mean square of the entries of a direction that centroids are made of."""


def starts_experts_from_data(config: TuckAConfig) -> bool:
    """Whether new experts wait for moments of the data."""
    return config.init_experts in DATA_STARTS and bool(config.init_weights)


def starts_from_data(config: TuckAConfig) -> bool:
    """Whether a new adapter reads calibration batches, for its experts or its centroids."""
    return starts_experts_from_data(config) or config.init_router != "kaiming"


def start_experts(experts: ExpertTensor, config: TuckAConfig) -> None:
    """Fill new experts as the configuration says."""
    if config.init_weights:
        EXPERT_STARTS[config.init_experts](experts)
    else:
        experts.normal_(std=0.02)


def start_experts_from(experts: ExpertTensor, found: Decomposition, config: TuckAConfig) -> None:
    """Write a decomposition into the experts of a layer: its factors, and zero cores or the cores of a warm start.

    With a shared slice, that holds the mean expert and the core what each group differs by. Of cores with diagonal
    blocks, the blocks of the decomposition's are taken.
    """
    found = found._replace(core=diagonal_blocks(found.core, experts.core.shape[-1]))
    core, shared = torch.zeros_like(found.core), None
    if config.warm_start or config.normalize is True:
        sign = DATA_STARTS[config.init_experts]
        slices_KTRH = torch.einsum("tp,kpqr->ktqr", found.expert_factor, found.core)
        norm = slices_KTRH.square().sum((-2, -1)).sqrt().mean()  # of the experts, whose factors are orthonormal
        scale = sign * (config.warm_start or 1.0) / (config.alpha * norm.clamp_min(torch.finfo(norm.dtype).tiny))
        core = found.core * scale
        if experts.shared_core is not None:
            shared = slices_KTRH.mean((0, 1)) * scale
            # The combination of the expert factor's columns that gives every expert the same, as nearly as they can.
            weights_P = torch.linalg.pinv(found.expert_factor).sum(-1)
            core = core - torch.einsum("p,qr->pqr", weights_P, shared)
    if shared is None and experts.shared_core is not None:
        shared = torch.zeros_like(experts.shared_core)
    experts.write_(core, found.expert_factor, found.input_factor, found.output_factor, shared)


@torch.no_grad()
def start_router_from(
    router: Router,
    features: Tensor,  # (N, F), one for each sample
) -> None:
    """Start a router by k-means; "kmeans_balanced" adds the bias that holds the routes to the balanced clusters.

    The clusters are those of scaled features; with the cosine affinity, of their directions.

    Raises
    ------
    ValueError
        If there are fewer samples than experts.
    """
    config = router.config
    balanced = config.init_router == "kmeans_balanced"
    features = features.double()
    placement = router.placement_of(features)
    placed = placement(features)
    if config.affinity == "cosine":
        # Only directions count. The length sets how fast an optimiser turns centroids: routes that move faster than
        # the experts behind them can follow were seen to cost accuracy at high learning rates.
        placed = torch.nn.functional.normalize(placed, dim=-1) * CENTROID_ENTRY * placed.shape[-1] ** 0.5
    centroids = nested_kmeans(placed.cpu().numpy(), config.k, config.t, balanced=balanced)
    centroids_CF = torch.from_numpy(centroids).to(placed)
    spread = torch.cdist(placed, centroids_CF).amin(-1).square().mean()
    router.restart(centroids_CF, placement, spread)
    if balanced and router.balance_bias is not None:
        bias_K = balancing_bias(router.scores(features.to(router.centroids)))
        router.balance_bias.copy_(bias_K.unsqueeze(-1).expand_as(router.balance_bias))


def balancing_bias(
    scores: Tensor,  # (N, K, T)
    rounds: int = 400,
) -> Tensor:  # (K,), its sum zero
    """The bias on the choice that spreads these units most evenly, up to the slack of balanced k-means.

    Steps against the load shrink from round to round; the best bias met is returned.
    """
    groups = scores.shape[1]
    bias, best, least = scores.new_zeros(groups), scores.new_zeros(groups), float("inf")
    for step in range(rounds):
        chosen = choose_group(scores + bias.view(1, -1, 1))
        share = torch.bincount(chosen, minlength=groups).to(scores) / len(scores)
        if float(share.max()) < least:
            best, least = bias.clone(), float(share.max())
        if least * groups <= SLACK:
            break
        bias = bias + (1 / groups - share) * (1 - step / rounds)
    return best - best.mean()
