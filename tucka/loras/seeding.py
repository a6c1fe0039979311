"""Routers that know which LoRA a sample belongs to, from samples of each.

Shape legend: B samples of a batch, N samples in all, K groups (LoRAs; T = 1), F length of a routing feature (see
`tucka.ops`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from ..calibration import FeatureReader, as_found, bare, device_of, progress_bar
from ..config import TuckAConfig
from ..model import dispatchers_of, layers_of
from ..ranks.families import first_process
from ..ranks.resizing import write_config
from ..routing import Router
from ..starts import CENTROID_ENTRY

Groups = Union[str, Sequence[Union[int, str]], Tensor]

Labelled = Iterable[tuple[Any, Callable[[int], list[int]]]]
"""Batches, each with a function that gives the groups of its so many samples."""

OPEN = 0.999
"""Gate that the temperature is chosen for: how fully a sample is given the LoRA it is routed to …"""

SHARE = 0.95
"""… and the share of the samples that are to have it."""

COLDEST = 1e-3
"""Lowest temperature that is chosen: cosines that differ by less than some 0.005 then still share a sample."""


class Seeding(NamedTuple):
    """How well a router tells apart the samples it was seeded from."""

    share: tuple[float, ...]  # (K,) of every LoRA's samples, the share that is routed to it
    gate: tuple[float, ...]  # (K,) mean gate of every LoRA's samples, wherever they are routed


def labelled(names: list[str], samples: Any, groups: Optional[Groups]) -> list[Labelled]:
    """Streams of batches and their groups: one loader for each LoRA, or one for all and the groups of its samples.

    What can be told without reading a batch is checked here.

    Raises
    ------
    ValueError
        If loaders or groups do not match the LoRAs.
    """
    if isinstance(groups, str):
        return [_by_key(names, samples, groups)]
    if groups is not None:
        indices = iter([_index(names, group) for group in groups])
        return [((batch, lambda count: list(islice(indices, count))) for batch in samples)]
    if isinstance(samples, Mapping):
        if set(samples) != set(names):
            raise ValueError(f"samples are given for {list(samples)}, but the adapters are {names}")
        samples = [samples[name] for name in names]
    if not isinstance(samples, Sequence) or len(samples) != len(names):
        raise ValueError(f"samples must be {len(names)} loaders, one for each of {names}; one for all needs groups=…")
    return [_all_of(index, loader) for index, loader in enumerate(samples)]


def _by_key(names: list[str], loader: Iterable[Any], key: str) -> Labelled:
    for batch in loader:
        if not isinstance(batch, Mapping) or key not in batch:
            raise ValueError(f"groups={key!r} is no key of the batches")
        found = [_index(names, group) for group in batch[key]]
        yield {name: value for name, value in batch.items() if name != key}, partial(_whole, found)


def _whole(groups: list[int], count: int) -> list[int]:
    return groups


def _all_of(index: int, loader: Iterable[Any]) -> Labelled:
    for batch in loader:
        yield batch, lambda count: [index] * count


def _index(names: list[str], group: Any) -> int:
    if isinstance(group, str) and group in names:
        return names.index(group)
    if isinstance(group, str) or not 0 <= int(group) < len(names):
        raise ValueError(f"groups name {group!r}, which is neither one of {names} nor 0 to {len(names) - 1}")
    return int(group)


def seed_routers(
    model: nn.Module,
    name: str,
    streams: list[Labelled],
    limit: int,
    choose_temperature: bool,
    progress: bool,
) -> dict[str, Seeding]:
    """Start the routers of an adapter from labelled samples; by tower.

    Centroids are the mean features of every LoRA's samples, scaled as those of `tucka.starts`; LoRAs count alike,
    however many samples they have.

    Raises
    ------
    ValueError
        If a LoRA has no sample, or groups do not match the samples of a batch.
    """
    layers = layers_of(model)
    config: TuckAConfig = model.peft_config[name]  # type: ignore[assignment, index]
    with as_found(model), bare(layers):
        found = _read(model, FeatureReader(layers, name, per_sample=True), streams, limit, progress)
    if not found:
        raise ValueError("no sample reached a router: the samples yield no batch")
    routers = {tower: dispatcher.router(name) for tower, dispatcher in dispatchers_of(model, name).items()}
    for tower, (features, groups) in found.items():
        missing = set(range(config.k)).difference(groups.tolist())
        if missing:
            where = f" of {tower!r}" if tower else ""
            raise ValueError(f"no sample of adapter {min(missing)} (of 0 to {config.k - 1}) reached the router{where}")
        _seed(routers[tower], features, groups)
    if choose_temperature and config.k > 1:
        coldest = min(_temperature(routers[tower], features) for tower, (features, _) in found.items())
        write_config(model, name, temperature=first_process(coldest))
    return {tower: _measure(routers[tower], *seen) for tower, seen in found.items()}


def _read(
    model: nn.Module, reader: FeatureReader, streams: list[Labelled], limit: int, progress: bool
) -> dict[str, tuple[Tensor, Tensor]]:  # (N, F), (N,) by tower
    """Features and groups of at most (about) so many samples of every stream."""
    labels: dict[str, list[int]] = {tower: [] for tower in reader.features}
    device = device_of(model)
    with progress_bar(limit * len(streams), "routing", progress) as bar:
        for stream in streams:
            seen = 0
            for batch, groups_of in stream:
                before = {tower: len(parts) for tower, parts in reader.features.items()}
                units = reader.read(model, batch, device)
                groups = groups_of(units)
                if len(groups) != units:
                    raise ValueError(f"groups hold {len(groups)} entries for the {units} samples of a batch")
                for tower, parts in reader.features.items():
                    if len(parts) > before[tower]:
                        labels[tower] += groups
                seen += units
                bar.update(units)
                if seen >= limit:
                    break
    return {
        tower: (torch.cat(parts), torch.tensor(labels[tower], device=parts[0].device))
        for tower, parts in reader.features.items()
        if parts
    }


@torch.no_grad()
def _seed(
    router: Router,
    features: Tensor,  # (N, F)
    groups: Tensor,  # (N,)
) -> None:
    members = [features[groups == group].double() for group in range(router.config.k)]
    most = max(map(len, members))
    # Every LoRA's samples repeated to one number: the centre then lies amid the LoRAs, not at the one with most data.
    even_KNF = torch.stack([own[torch.arange(most, device=own.device) % len(own)] for own in members])
    even_MF = even_KNF.flatten(0, 1)
    placement = router.placement_of(even_MF)
    placed_KNQ = placement(even_MF).unflatten(0, even_KNF.shape[:2])
    if router.config.affinity == "cosine":
        placed_KNQ = nn.functional.normalize(placed_KNQ, dim=-1) * CENTROID_ENTRY * placed_KNQ.shape[-1] ** 0.5
    centroids_KQ = placed_KNQ.mean(1)
    spread = (placed_KNQ - centroids_KQ.unsqueeze(1)).square().sum(-1).mean()
    router.restart(centroids_KQ, placement, spread)


@torch.no_grad()
def _temperature(
    router: Router,
    features: Tensor,  # (N, F)
) -> float:
    """The temperature at which a sample's best group has the gate `OPEN` for the wanted share of samples.

    A gate is at least 1 / (1 + (K−1) exp(−gap/τ)), with the gap between the best two logits at τ = 1.
    """
    config = router.config
    log_scores_NK = router.scores(features).flatten(1).double().clamp_min(1e-300).log() * config.temperature
    best_N2 = log_scores_NK.topk(2, dim=-1).values
    gap = float((best_N2[:, 0] - best_N2[:, 1]).quantile(1 - SHARE))
    wanted = gap / math.log((config.k - 1) * OPEN / (1 - OPEN))
    return min(max(wanted, COLDEST), config.temperature)


@torch.no_grad()
def _measure(router: Router, features: Tensor, groups: Tensor) -> Seeding:
    route = router(features)
    assert route.gates is not None
    right, gates = (route.group == groups).double(), route.gates[:, 0]
    means = [[float(value[groups == k].mean()) for value in (right, gates)] for k in range(router.config.k)]
    share, gate = zip(*means)
    return Seeding(share, gate)
