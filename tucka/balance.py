"""How evenly the groups are used: measures of load, a meter that counts it on the device, and the balancing bias.

Shape legend: N routed units, K groups, T experts in a group (see `tucka.ops`).

A unit is what is routed as one: a sample, or with ``routing="batch"`` a whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .processes import is_distributed

if TYPE_CHECKING:
    from .routing import Route, Router


def bias_step(
    group: Tensor,  # (N,) chosen group of every routed unit
    groups: int,
    rate: float,
) -> Tensor:  # (K,)
    """Change of every group's bias after one training forward: γ (1 − K · load).

    For a single routed unit that is −γ(K−1) for the chosen group and +γ for the others (TuckA, arXiv 2511.06859,
    load-balancing baseline); with several units the load is the share of units that chose the group. A forward that
    routed nothing changes nothing, so the sum over the groups stays zero.
    """
    counts_K = torch.zeros(groups, device=group.device).index_add_(
        0, group, torch.ones(group.shape, device=group.device)
    )
    units = group.shape[0]
    return rate * (1 - groups * counts_K / units) if units else counts_K


# --- measures of a share ---------------------------------------------------------------------------------------------


def entropy(share: Tensor) -> Tensor:
    """Entropy of the loads over its largest value: −Σ s log s / log K, 1 for even loads and 0 for a single user.

    Parameters
    ----------
    share : Tensor, (..., K)
        Loads of the groups (or of all experts, flattened); divided by their sum, so counts will do.

    Returns
    -------
    Tensor, (...)
        1 for a single group, which is always evenly used; 0 where nothing was counted.
    """
    share = _normalised(share)
    if share.shape[-1] == 1:
        return torch.ones_like(share[..., 0])
    return torch.special.entr(share).sum(-1) / math.log(share.shape[-1])


def coefficient_of_variation(share: Tensor) -> Tensor:
    """Standard deviation of the loads (over all K) divided by their mean: 0 for even loads, √(K−1) for a single user.

    Parameters
    ----------
    share : Tensor, (..., K)
        Loads of the groups; counts will do.

    Returns
    -------
    Tensor, (...)
        0 where nothing was counted.
    """
    share = _normalised(share)
    return share.std(-1, correction=0) * share.shape[-1]


def max_violation(share: Tensor) -> Tensor:
    """MaxVio, the largest load over the mean load minus one: 0 for even loads, K−1 for a single user.

    Wang et al. 2024, Auxiliary-loss-free load balancing strategy for mixture-of-experts, arXiv 2408.15664.

    Parameters
    ----------
    share : Tensor, (..., K)
        Loads of the groups; counts will do.

    Returns
    -------
    Tensor, (...)
        0 where nothing was counted.
    """
    share = _normalised(share)
    return (share.amax(-1) * share.shape[-1] - 1).clamp_min(0)


def _normalised(share: Tensor) -> Tensor:
    """Loads that sum to one in floating point; all zero where there is none."""
    share = share if share.is_floating_point() else share.to(torch.get_default_dtype())
    total = share.sum(-1, keepdim=True)
    return share / torch.where(total > 0, total, torch.ones_like(total))


# --- counting --------------------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What part of the units each group and each expert took; every field is a tensor on the meter's device."""

    group_share: Tensor  # (K,) share of units that chose the group; all zero if nothing was counted
    expert_share: Tensor  # (K, T) share of units whose largest gate is the expert's; sums to `group_share` over T
    units: Tensor  # () number of units counted, int64


class LoadMeter:
    """Counts routes on the device; nothing waits for it until a load is read and turned into numbers.

    Parameters
    ----------
    groups, experts : int
        K and T.
    device : torch.device, optional
    """

    def __init__(self, groups: int, experts: int, device: torch.device | None = None) -> None:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be counted into outside of it
            # Whole numbers: single precision would stop counting at 2²⁴.
            self.counts = torch.zeros(groups, experts, dtype=torch.int64, device=device)  # (K, T)

    def append(self, route: Route) -> None:
        """Count a route, so that a meter can stand wherever a list of routes does.

        A unit counts for its group and for the expert of that group that weighs most.

        Raises
        ------
        ValueError
            If the route has no gates, or gates of another number of experts.
        """
        experts = self.counts.shape[1]
        if route.gates is None or route.gates.shape[-1] != experts:
            given = "none" if route.gates is None else route.gates.shape[-1]
            raise ValueError(f"a meter of t={experts} experts counts routes of that many gates, but this has {given}")
        with torch.no_grad():
            index_N = route.group * experts + route.gates.argmax(-1)
            # index_add_ and not bincount, whose output size would have to be read from the device.
            index_N = index_N.to(self.counts.device)
            self.counts.view(-1).index_add_(0, index_N, torch.ones_like(index_N))

    def reset(self) -> None:
        """Forget what was counted."""
        self.counts.zero_()

    def load(self, across_processes: bool = False) -> Load:
        """What was counted since the last reset, as shares.

        Parameters
        ----------
        across_processes : bool
            In a distributed run, add up the counts of all processes; all of them have to ask.
        """
        counts = self.counts.clone()
        distributed = torch.distributed
        if across_processes and is_distributed():
            distributed.all_reduce(counts)
        units = counts.sum()
        expert_share = counts / units.clamp_min(1)
        return Load(expert_share.sum(-1), expert_share, units)


class RouterLoads:
    """The loads of one router, those of training forwards apart from those of evaluation.

    Which of the two a forward is, the router module's `training` flag says. A new module is in training mode until
    `model.train()` or `model.eval()` is called, whatever mode its base model was in.

    Parameters
    ----------
    router : Router
        The router whose routes are appended.

    Attributes
    ----------
    training, evaluation : LoadMeter
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        config, device = router.config, router.centroids.device
        self.training = LoadMeter(config.k, config.t, device)
        self.evaluation = LoadMeter(config.k, config.t, device)

    def append(self, route: Route) -> None:
        """Count a route the router took."""
        meter = self.training if self.router.training else self.evaluation
        meter.append(route)

    def reset(self) -> None:
        """Forget what was counted."""
        self.training.reset()
        self.evaluation.reset()


@contextmanager
def record_loads(model: nn.Module, adapter_name: str | None = None) -> Iterator[Any]:
    """Count the load of every group over all forwards of the base model, without waiting for the device.

    A unit counts once in every forward, so once for each token that `generate` decodes.

    Parameters
    ----------
    model : PeftModel
        The adapted model.
    adapter_name : str, optional
        Whose routes; default: the active adapter's.

    Yields
    ------
    RouterLoads, or dict of RouterLoads
        For a model with several towers one per tower, by tower name.

    Raises
    ------
    ValueError
        If the model has no such adapter.

    Examples
    --------
    >>> with record_loads(model) as loads:  # doctest: +SKIP
    ...     evaluate(model)
    ...     print(max_violation(loads.evaluation.load().group_share))
    """
    name, loads = loads_of(model, adapter_name)
    with ExitStack() as stack:
        for tower, dispatcher in _dispatchers(model, name).items():
            stack.enter_context(dispatcher.recording(name, loads[tower]))
        yield next(iter(loads.values())) if len(loads) == 1 else loads


def loads_of(model: nn.Module, adapter_name: str | None = None) -> tuple[str, dict[str, RouterLoads]]:
    """The name of the adapter meant, and an empty `RouterLoads` for each of its routers by tower name."""
    from .model import single_adapter_name  # the model's layers import this module

    name = single_adapter_name(model, adapter_name)
    return name, {tower: RouterLoads(d.router(name)) for tower, d in _dispatchers(model, name).items()}


def _dispatchers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    from .model import dispatchers_of

    return dispatchers_of(model, adapter_name)
