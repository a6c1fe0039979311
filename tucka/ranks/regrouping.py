"""Other groups and experts made of those there are: what expanding and pruning write.

Shape legend: K groups, T experts in a group, P and R ranks, F length of a routing feature (see `tucka.ops`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..config import TuckAConfig
from ..model import dispatchers_of, layers_of
from ..ops import diagonal_blocks
from ..routing import Router
from .resizing import Carried, Parts, largest_core, one_hot, put, write_config, write_experts


class Regrouping(NamedTuple):
    """What becomes of one tower."""

    groups: list[int]  # the old group of every new one
    experts: list[int]  # the old expert of every new one, in every group
    shifts: Optional[Tensor] = None  # (K', T, F), over the old T, added to the centroids of copies
    split: bool = True  # copies share what the router gives their original


def regroup(
    model: nn.Module, adapter_name: str, plans: dict[str, Regrouping], optimizer: torch.optim.Optimizer | None
) -> None:
    """Carry out plans of all towers, whose numbers of new groups are one, and of new experts too.

    Everything is computed before anything is written.
    """
    config: TuckAConfig = model.peft_config[adapter_name]  # type: ignore[assignment, index]
    plan = next(iter(plans.values()))
    groups, per_group = len(plan.groups), len(plan.experts)
    # Cores of one norm in every group leave no room for experts that are fewer, or share what one gave.
    normalize = False if config.normalize is True and plan.experts != list(range(config.t)) else config.normalize
    dispatchers = dispatchers_of(model, adapter_name)
    shares = config.affinity != "paper" and any(_splits(plan) for plan in plans.values())
    layers: Any = [layer for layer in layers_of(model) if adapter_name in layer.tucka_experts]
    writes = []
    for layer in layers:
        experts = layer.tucka_experts[adapter_name]
        if layer.tucka_routed[adapter_name]:
            parts = _parts(experts, plans[layer.dispatcher.name])
        elif normalize != config.normalize:
            parts = _parts(experts, Regrouping([0], [0]))
        else:
            continue
        if normalize == "bounded" and largest_core(parts) >= 1:
            raise ValueError(
                f"a core of layer {layer.name!r} would act at {largest_core(parts):.6f} of its bound, which "
                "normalize='bounded' keeps below 1; lower it first (tucka.truncate raises alpha for that)"
            )
        writes.append((experts, parts))
    routers = {tower: _router_after(dispatchers[tower].router(adapter_name), plans[tower], shares) for tower in plans}
    changes = dict(k=groups, t=per_group, normalize=normalize, expert_shares=config.expert_shares or shares)
    for experts, parts in writes:
        write_experts(experts, parts, normalize, optimizer)
    for tower, after in routers.items():
        router, plan = dispatchers[tower].router(adapter_name), plans[tower]
        rows = [group * config.t + expert for group in plan.groups for expert in plan.experts]
        ones = torch.ones((), device=router.centroids.device)
        carried = Carried(optimizer, router.centroids, ones, {0: one_hot(rows, config.k * config.t)})
        put(router.centroids, after["centroids"])
        carried.put_down(ones)
        if router.balance_bias is not None:
            put(router.balance_bias, after["balance_bias"])
        if "log_share" in after:
            router.log_share = after["log_share"]
    write_config(model, adapter_name, **changes)


def _splits(plan: Regrouping) -> bool:
    copied = len(set(plan.groups)) < len(plan.groups) or len(set(plan.experts)) < len(plan.experts)
    return plan.split and copied


@torch.no_grad()
def _parts(experts: Any, plan: Regrouping) -> Parts:
    """The experts of a layer after a plan.

    The copies of an expert all are active, so each holds its part. Between copies rows of C move apart, by as much in
    sum as nothing: as long as their gates are equal nothing changes, and they learn different things.
    """
    core, (_, expert_factor, input_factor, output_factor) = experts.decomposition
    width, shared = experts.core.shape[-1], experts.shared_slice
    core, old_TP = diagonal_blocks(core.double()[plan.groups], width), expert_factor.double()
    new_TP = old_TP[plan.experts]
    copies = Counter(plan.experts)
    generator = torch.Generator().manual_seed(0)
    for expert, count in copies.items():
        if count > 1:
            rows = [index for index, source in enumerate(plan.experts) if source == expert]
            noise = torch.randn(count, old_TP.shape[1], generator=generator, dtype=torch.float64).to(old_TP)
            noise = noise - noise.mean(0)
            size = old_TP[expert].square().sum() / noise.square().sum().clamp_min(1e-12)
            new_TP[rows] = (new_TP[rows] + 0.5 * (size * count).sqrt() * noise) / count
    if experts.normalize:
        norm = old_TP.square().sum().sqrt()
        fraction = new_TP.square().sum().sqrt() / norm
        core = core * fraction
        new_TP = new_TP / fraction
    return Parts(
        core,
        new_TP,
        None if experts.input_factor is None else input_factor.double(),
        None if experts.output_factor is None else output_factor.double(),
        None if shared is None else diagonal_blocks(shared.double(), width),
        {
            "core": {0: one_hot(plan.groups, len(experts.core))},
            "expert_factor": {0: one_hot(plan.experts, len(old_TP))},
        },
    )


@torch.no_grad()
def _router_after(router: Router, plan: Regrouping, shares: bool) -> dict[str, Tensor]:
    config = router.config
    centroids_KTF = router.centroids.detach().clone().unflatten(0, (config.k, config.t))
    centroids_KTF = centroids_KTF[plan.groups]
    if plan.shifts is not None:
        centroids_KTF = centroids_KTF + plan.shifts.to(centroids_KTF)
    found = {"centroids": centroids_KTF[:, plan.experts].flatten(0, 1)}
    if router.balance_bias is not None:
        found["balance_bias"] = router.balance_bias[plan.groups][:, plan.experts].clone()
    if shares or router.log_share is not None:
        old = router.log_share if router.log_share is not None else router.centroids.new_zeros(config.k, config.t)
        new = old[plan.groups][:, plan.experts].clone()
        if plan.split:
            new -= old.new_tensor([plan.groups.count(group) for group in plan.groups]).log().unsqueeze(1)
            new -= old.new_tensor([plan.experts.count(expert) for expert in plan.experts]).log()
        found["log_share"] = new
    return found
