"""The route, and the router that takes it: one per model, or one per tower.

Shape legend: N routed units, S positions, D input features of the router's layer, F features of the pooled input,
Q entries of the feature as it is placed among the centroids, K groups, T experts in a group (see `tucka.ops`).
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from . import balance, ops
from .config import TuckAConfig
from .placement import Placement, standardised, whitened
from .processes import from_first_process, is_distributed, mean_over_processes, sum_over_processes, whole


class Route(NamedTuple):
    """What a router decided for one forward of the base model; every field is a tensor, so nothing leaves the device.

    `scores` is None in a route that a user made by hand; with `gates` None as well, the router scores the groups that
    were chosen for it.
    """

    group: Tensor  # (N,) chosen group of every routed unit
    gates: Optional[Tensor] = None  # (N, T) weight of each expert of that group
    scores: Optional[Tensor] = None  # (N, K, T) scores of all experts

    def map(self, function) -> Route:
        """Apply a function to every tensor present."""
        gates = None if self.gates is None else function(self.gates)
        return Route(function(self.group), gates, None if self.scores is None else function(self.scores))

    def detach(self) -> Route:
        """The same route without its gradient; the route itself where it has none."""
        tracked = any(field is not None and field.requires_grad for field in self)
        return self.map(Tensor.detach) if tracked else self

    def to(self, device: torch.device) -> Route:
        """The same route on a device."""
        return self.map(lambda field: field.to(device))

    def expand(self, samples: int) -> Route:
        """Repeat every unit for the samples made from it: beams and returned sequences of one prompt share its route.

        Raises
        ------
        ValueError
            If the number of samples is no multiple of the number of units.
        """
        units = self.group.shape[0]
        if units in (1, samples):
            return self
        if units == 0 or samples % units:
            raise ValueError(f"a route of {units} units cannot serve {samples} samples: not a multiple")
        return self.map(lambda field: field.repeat_interleave(samples // units, dim=0))


class Router(nn.Module):
    """Centroids, and the rule that turns the first adapted layer's input into a route.

    Parameters
    ----------
    config : TuckAConfig
        Reads k, t, routing, affinity, temperature, pooling, components, pool_padding, balance_bias, balance_rate,
        perturb_scale, init_router and sync_route.
    width : int
        Input features D of the router's layer.
    sources : tuple of str, optional
        Names of the only layers whose input may feed this router.
    """

    centroids: nn.Parameter  # (K T, Q), of placed features
    initialised: Tensor  # () bool
    center: Optional[Tensor]  # (F,) mean feature of the calibration
    scale: Optional[Tensor]  # (F,) what its entries are divided by
    axes: Optional[Tensor]  # (F, Q) principal components over their standard deviations, in place of the scale
    spread: Optional[Tensor]  # () mean squared distance of its features to their own centroids
    balance_bias: Optional[Tensor]  # (K, T)
    log_share: Optional[Tensor]  # (K, T) log of the part of its original that an expert is; see `ops.shared_softmax`

    def __init__(
        self,
        config: TuckAConfig,
        width: int,
        sources: tuple[str, ...] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.width = width
        self.sources = sources
        features, placed = config.feature_size(width), config.placed_size(width)
        self.centroids = nn.Parameter(torch.empty(config.k * config.t, placed, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.centroids, a=5**0.5)
        centred = config.affinity != "paper"
        scaled, whitens = centred and not config.whitens, config.whitens
        self.register_buffer("center", torch.zeros(features, device=device, dtype=dtype) if centred else None)
        self.register_buffer("scale", torch.ones(features, device=device, dtype=dtype) if scaled else None)
        self.register_buffer("axes", torch.zeros(features, placed, device=device, dtype=dtype) if whitens else None)
        self.register_buffer("spread", torch.ones((), device=device, dtype=dtype) if centred else None)
        self.register_buffer("initialised", torch.tensor(not self.starts_from_data, device=device))
        biased = config.balance_bias or config.init_router == "kmeans_balanced"
        bias = torch.zeros(config.k, config.t, device=device, dtype=dtype) if biased else None
        self.register_buffer("balance_bias", bias)
        shares = torch.zeros(config.k, config.t, device=device, dtype=dtype) if config.expert_shares else None
        self.register_buffer("log_share", shares)
        # Kept beside the buffer because reading a buffer in every forward would wait for the device.
        self.awaits_start = self.starts_from_data

    @property
    def starts_from_data(self) -> bool:
        """Whether the centroids wait for a batch."""
        return self.config.init_router != "kaiming"

    @property
    def per_sample(self) -> bool:
        """Whether every sample is a routed unit."""
        return self.config.routing == "sample"

    def may_feed(self, layer_name: str) -> bool:
        """Whether that layer's input may feed the router."""
        return self.sources is None or layer_name in self.sources

    def feature(
        self,
        x: Tensor,  # (N, S, D)
        keep: Tensor | None,  # (N, S)
        alone: bool = False,
    ) -> Tensor:  # (N, F)
        """Pool the router layer's input in the centroids' precision; `alone`: whatever other processes hold."""
        synchronised = self.config.sync_route and not alone and is_distributed()
        reduce = sum_over_processes if synchronised else _this_process
        # Half of single precision, which FSDP2's mixed precision gives parameters, would flip near ties.
        precision = torch.promote_types(self.centroids.dtype, torch.float32)
        with _no_autocast(x):
            keep = None if self.config.pool_padding else keep
            return ops.pool(x.to(precision), keep, self.config.pooling, reduce)

    def forward(
        self,
        feature: Tensor,  # (N, F)
        group: Tensor | None = None,  # (N',) groups chosen by the user
    ) -> Route:
        """Score all experts, choose a group (unless it is given) and read its gates."""
        with _no_autocast(feature):
            scores = self.scores(feature)
            if group is None:
                biased = scores.detach() if self.balance_bias is None else scores.detach() + self.balance_bias
                group = ops.choose_group(biased)
            else:
                units = max(scores.shape[0], group.shape[0])
                scores, group = scores.expand(units, -1, -1), group.expand(units)
            return Route(group, ops.group_gates(scores, group), scores)

    def scores(
        self,
        feature: Tensor,  # (N, F)
    ) -> Tensor:  # (N, K, T)
        """Score a feature against all centroids by the configured affinity."""
        config = self.config
        centroids = whole(self.centroids).to(feature.dtype)
        if self.spread is None:
            return ops.paper_affinity(feature, centroids, config.k)
        feature = self.placed(feature)
        if config.affinity == "cosine":
            return ops.cosine_affinity(feature, centroids, config.k, config.temperature, self.log_share)
        return ops.distance_affinity(feature, centroids, config.k, config.temperature, self.spread, self.log_share)

    @property
    def placement(self) -> Placement:
        """How features are placed among the centroids."""
        return Placement(self.center, self.scale, self.axes)

    def placed(
        self,
        feature: Tensor,  # (N, F)
    ) -> Tensor:  # (N, Q)
        """Features as they lie among the centroids."""
        return self.placement(feature)

    @torch.no_grad()
    def start(
        self,
        feature: Tensor,  # (N, F)
    ) -> None:
        """Start from the first batch, in place, so that an optimiser built before keeps its parameter.

        "perturb" (the paper): centroid 1 is the batch's mean feature, the others that feature plus
        U(−1, 1)·perturb_scale per entry. The k-means starts, which had no calibration: random units of the batch.
        """
        feature = feature.detach()
        if not len(feature) and not is_distributed():
            return  # no sample to start from: the next batch has one
        if self.config.init_router == "perturb":
            noise = torch.rand_like(self.centroids) * 2 - 1
            noise[0] = 0
            centroids = feature.mean(0) + self.config.perturb_scale * noise
            placement = Placement(torch.zeros_like(centroids[0]), torch.ones_like(centroids[0]))
        else:
            placement = self.placement_of(feature)
            units = torch.randperm(feature.shape[0], device=feature.device)
            chosen = units[torch.arange(len(self.centroids), device=units.device) % feature.shape[0]]
            # Units may be fewer than centroids: a little noise tells their copies apart.
            centroids = placement(feature[chosen]) + 0.1 * torch.randn_like(self.centroids)
        # Distances to the nearest centroid would say little: a unit that became one lies at none.
        self._write(centroids, placement, placement(feature).square().sum(-1).mean())

    def placement_of(
        self,
        feature: Tensor,  # (N, F)
    ) -> Placement:
        """How features like these are to be placed among centroids; with the paper's affinity they stay as they are."""
        if self.center is None:
            return Placement()
        if self.axes is not None:
            return whitened(feature, self.axes.shape[1], self.config.k)
        return standardised(feature)

    def _write(self, centroids: Tensor, placement: Placement, spread: Tensor) -> None:
        """Write a start, unless whoever loaded the parameters wrote them past this module; the flag came along."""
        # Features that all are centroids have no spread, and the affinity divides by it.
        fresh = (centroids, *placement, spread.clamp_min(1e-3))
        for held, new in zip((self.centroids, self.center, self.scale, self.axes, self.spread), fresh):
            if held is not None and new is not None:
                value = torch.where(self.initialised, held, new)  # every process starts alike
                held.copy_(from_first_process(value))
        self.initialised.fill_(True)
        self.awaits_start = False

    @torch.no_grad()
    def restart(
        self,
        centroids: Tensor,  # (K T, Q)
        placement: Placement,
        spread: Tensor,  # ()
    ) -> None:
        """Start (again) from given centroids, whatever was there."""
        self.initialised.fill_(False)
        placement = placement.map(lambda part: part.to(self.centroids))
        self._write(centroids.to(self.centroids), placement, spread.to(self.centroids))

    def snapshot(self) -> tuple[dict[str, Tensor], bool]:
        """A copy of the state, for `restore`."""
        return {name: value.clone() for name, value in self.state_dict().items()}, self.awaits_start

    @torch.no_grad()
    def restore(self, snapshot: tuple[dict[str, Tensor], bool]) -> None:
        """Put a state back, in place."""
        values, self.awaits_start = snapshot
        for name, value in self.state_dict().items():
            value.copy_(values[name])

    @torch.no_grad()
    def balance(self, group: Tensor) -> None:
        """Move the balancing bias against the load of one training forward, over all processes.

        Does nothing without `balance_bias`.
        """
        if self.config.balance_bias and self.balance_bias is not None:
            step_K = balance.bias_step(group, self.config.k, self.config.balance_rate)
            self.balance_bias += mean_over_processes(step_K, len(group)).unsqueeze(-1)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        flag = state_dict.get(prefix + "initialised")
        if flag is not None:
            self.awaits_start = not bool(flag)


def _this_process(total: Tensor) -> Tensor:
    return total


def _no_autocast(x: Tensor):
    """Routes are discrete: reduced precision would flip near ties."""
    return torch.autocast(device_type=x.device.type, enabled=False)
