"""What an adapter does on data: routes, and how far experts move the activations.

Shape legend: N samples, B samples of a batch, n rows (tokens) of a layer's input, K groups, T experts in a group,
R rank, D and O features, F length of a routing feature (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tucka import pin_route
from tucka.calibration import FeatureReader, Rows, as_found, device_of, listening, progress_bar, run_batch
from tucka.layer import TuckALayer
from tucka.model import dispatchers_of, layers_of, single_adapter_name
from tucka.recording import unrecorded
from tucka.routing import Route

from .adapters import Adapter, LayerExperts, adapter_of

CHUNK = 2**22
"""Numbers that a step of the movements holds at once."""


class LayerObservation(NamedTuple):
    """One layer on data; rows are unpadded tokens.

    Attributes
    ----------
    rows : ndarray, (K,)
        Rows of the samples that were routed to each group.
    mean, covariance : ndarray, (R,) and (R, R)
        Of the projected input x U over all rows.
    experts : ndarray, (K, T)
        Mean relative movement by each expert with its gate, ‖α g_j x 𝒯[i,j]‖ / ‖z‖, over the rows of its group; z is
        the layer's input, or in the additive form the output of the base layer. NaN for a group without rows.
    groups : ndarray, (K,)
        The same for the whole update, the shared slice included.
    """

    rows: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray
    experts: np.ndarray
    groups: np.ndarray


class RoutingObservation(NamedTuple):
    """One tower's routing: N samples, or N batches where these are routed as one.

    Attributes
    ----------
    router : str
        Name of the layer that holds the router.
    features : ndarray, (N, F)
    group : ndarray, (N,)
    gates : ndarray, (N, T)
    """

    router: str
    features: np.ndarray
    group: np.ndarray
    gates: np.ndarray


class Observations(NamedTuple):
    """What `observe` saw.

    Attributes
    ----------
    adapter : Adapter
        As it was observed.
    layers : dict of LayerObservation
        By layer name; layers that no forward reached, or that read what all samples share, are missing.
    routing : dict of RoutingObservation
        By tower name.
    labels : ndarray, (N,), or None
        The entry of the batches that was asked for.
    """

    adapter: Adapter
    layers: dict[str, LayerObservation]
    routing: dict[str, RoutingObservation]
    labels: np.ndarray | None


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int = 512,
    labels: str | None = None,
    adapter_name: str | None = None,
    progress: bool = True,
) -> Observations:
    """Run an adapted model over data and gather what its measures need, in evaluation mode and with nothing changed;
    whoever records routes or loads does not see these forwards.

    Parameters
    ----------
    model : PeftModel
        An adapted model.
    batches : iterable
        Batches that the model takes.
    samples : int
        Stop once so many samples were read.
    labels : str, optional
        An entry of the batches with one value per sample (a class, a domain, a task), to set routes against. The model
        is given it only if it is called "labels".
    adapter_name : str, optional
        Default: the active adapter.
    progress : bool
        Show a progress bar.

    Raises
    ------
    ValueError
        If there is no batch, no such adapter, or no such entry with one value per sample.
    """
    name = single_adapter_name(model, adapter_name)
    adapter, layers = adapter_of(model, name), [layer for layer in layers_of(model) if name in layer.tucka_experts]
    dispatchers = dispatchers_of(model, name)
    gathered = {layer.name: _Gathered(adapter.layer(layer.name)) for layer in layers}
    routes: dict[str, list[tuple[Tensor, Route]]] = {}
    found_labels: list[np.ndarray] = []
    seen = 0
    ours = unrecorded(dispatchers.values())
    with as_found(model), ours, torch.no_grad(), progress_bar(samples, "observing", progress) as bar:
        for batch in batches:
            batch, values = _without_labels(batch, labels)
            taken, size = _routes_of(model, layers, name, batch)
            for tower, pair in taken.items():
                routes.setdefault(tower, []).append(pair)
            _listen(model, layers, batch, taken, gathered)
            if values is not None:
                found_labels.append(_checked(values, size, labels))
            seen += size
            bar.update(min(size, samples - bar.n))
            if seen >= samples:
                break
    if not seen:
        raise ValueError("there is no batch to observe")
    return Observations(
        adapter,
        {layer: part.result() for layer, part in gathered.items() if part.total},
        {tower: _routing(dispatchers[tower].router_owners[name].name, pairs) for tower, pairs in routes.items()},
        np.concatenate(found_labels) if found_labels else None,
    )


def expert_movement(observed: Observations) -> pd.DataFrame:
    """How far each expert moves the activations of the samples routed to it.

    Columns ``layer``, ``group``, ``expert`` and ``movement``: the mean of ‖α g_j x 𝒯[i,j]‖ / ‖z‖, NaN for a group that
    no sample was routed to. See `LayerObservation`.
    """
    lines = [
        (name, group, expert, layer.experts[group, expert])
        for name, layer in observed.layers.items()
        for group, expert in np.ndindex(layer.experts.shape)
    ]
    return pd.DataFrame(lines, columns=["layer", "group", "expert", "movement"])


def group_movement(observed: Observations) -> pd.DataFrame:
    """How far the whole update, shared slice included, moves the activations of every group's samples.

    Columns ``layer``, ``group``, ``movement`` (mean of ‖z' − z‖ / ‖z‖) and ``rows``.
    """
    lines = [
        (name, group, layer.groups[group], layer.rows[group])
        for name, layer in observed.layers.items()
        for group in range(len(layer.groups))
    ]
    return pd.DataFrame(lines, columns=["layer", "group", "movement", "rows"])


# --- one batch -----------------------------------------------------------------------------------------------------


def _without_labels(batch: Any, labels: str | None) -> tuple[Any, Any]:
    if labels is None:
        return batch, None
    if not isinstance(batch, Mapping) or labels not in batch:
        held = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ValueError(f"labels={labels!r} is no entry of the batch, which holds {held}")
    kept = {key: value for key, value in batch.items() if key != labels or labels == "labels"}
    return kept, batch[labels]


def _checked(values: Any, size: int, labels: str | None) -> np.ndarray:
    found = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.shape != (size,):
        raise ValueError(f"labels={labels!r} has shape {found.shape}, but the batch has {size} samples")
    return found


def _routes_of(
    model: nn.Module, layers: list[TuckALayer], name: str, batch: Any
) -> tuple[dict[str, tuple[Tensor, Route]], int]:
    """Feature and route of every tower that a batch reaches, and the number of samples."""
    reader = FeatureReader(layers, name, per_sample=True)
    size = reader.read(model, batch, device_of(model)) if reader.layers else 0
    dispatchers = dispatchers_of(model, name)
    if any(not dispatcher.router(name).per_sample for dispatcher in dispatchers.values()):
        reader = FeatureReader(layers, name, per_sample=False)
        reader.read(model, batch, device_of(model))
    found = {}
    for tower, features in reader.features.items():
        if features:
            found[tower] = (features[0], dispatchers[tower].router(name)(features[0]))
    return found, size


def _listen(
    model: nn.Module,
    layers: list[TuckALayer],
    batch: Any,
    taken: Mapping[str, tuple[Tensor, Route]],
    gathered: Mapping[str, _Gathered],
) -> None:
    """Run a batch at its routes and hear every layer."""

    def hear(layer: TuckALayer, x: Tensor, z: Tensor, rows: Rows) -> None:
        pair = taken.get(layer.dispatcher.name)
        gathered[layer.name].add(x[rows.keep], z[rows.keep], rows.sample[rows.keep], None if pair is None else pair[1])

    pinned = pin_route(model, {tower: route for tower, (_, route) in taken.items()}) if taken else nullcontext()
    additive = any(part.layer.form == "additive" for part in gathered.values())
    with pinned, listening(layers, additive, False, hear):
        run_batch(model, batch, device_of(model))


def _routing(router: str, pairs: list[tuple[Tensor, Route]]) -> RoutingObservation:
    features = torch.cat([feature for feature, _ in pairs]).cpu().double()
    group = torch.cat([route.group for _, route in pairs]).cpu()
    gates = torch.cat([route.gates for _, route in pairs if route.gates is not None]).cpu().double()
    return RoutingObservation(router, features.numpy(), group.numpy(), gates.numpy())


class _Gathered:
    """Running sums over the rows of one layer."""

    def __init__(self, layer: LayerExperts) -> None:
        self.layer, self.total = layer, 0
        rank = layer.core.shape[-1]
        self.sum, self.products = torch.zeros(rank).double(), torch.zeros(rank, rank).double()
        self.rows, self.groups = torch.zeros(layer.groups).double(), torch.zeros(layer.groups).double()
        self.experts = torch.zeros(layer.groups, layer.experts).double()

    def add(self, x: Tensor, z: Tensor, sample: Tensor, route: Route | None) -> None:
        """Add rows x (n, D) and z (n, D or O) of samples (n,), at the route of the batch (None: one expert alone)."""
        precise = torch.promote_types(x.dtype, torch.float32)
        place: Any = dict(device=x.device, dtype=precise)
        layer, output_gram = self.layer, (self.layer.output_factor.mT @ self.layer.output_factor).to(**place)
        projected_nR = x.to(precise) @ layer.input_factor.to(**place)
        size_n = torch.linalg.vector_norm(z.to(precise), dim=-1).clamp_min(torch.finfo(precise).tiny)
        self.total += len(x)
        self.sum += projected_nR.sum(0).cpu().double()
        self.products += (projected_nR.mT @ projected_nR).cpu().double()
        group_n, gates_nT = _of_rows(route, sample, layer)
        slices = layer.slices.to(**place)
        shared = torch.zeros_like(slices[0, 0]) if layer.shared is None else layer.shared.to(**place)
        at_once = max(1, CHUNK // slices[0].numel())
        for rows in torch.arange(len(x), device=x.device).split(at_once):
            group, gates = group_n[rows], gates_nT[rows].to(precise)
            gated_nTR = torch.einsum("nq,ntqr,nt->ntr", projected_nR[rows], slices[group], gates) * layer.alpha
            whole_nR = gated_nTR.sum(1) + layer.alpha * projected_nR[rows] @ shared
            sizes_nT, sizes_n = _sizes(gated_nTR, output_gram), _sizes(whole_nR, output_gram)
            self._count(group.cpu(), sizes_nT / size_n[rows, None], sizes_n / size_n[rows])

    def _count(self, group: Tensor, experts_nT: Tensor, whole_n: Tensor) -> None:
        self.rows.index_add_(0, group, torch.ones(len(group)).double())
        self.groups.index_add_(0, group, whole_n.cpu().double())
        self.experts.index_add_(0, group, experts_nT.cpu().double())

    def result(self) -> LayerObservation:
        """The means."""
        mean = self.sum / self.total
        return LayerObservation(
            self.rows.long().numpy(),
            mean.numpy(),
            (self.products / self.total - torch.outer(mean, mean)).numpy(),
            (self.experts / self.rows.unsqueeze(-1)).numpy(),
            (self.groups / self.rows).numpy(),
        )


def _of_rows(route: Route | None, sample: Tensor, layer: LayerExperts) -> tuple[Tensor, Tensor]:  # (n,), (n, T)
    """Group and gates of every row; a layer before the router has one expert, which is always fully on."""
    if route is None or route.gates is None or layer.groups * layer.experts == 1:
        return torch.zeros_like(sample), torch.ones(len(sample), 1, device=sample.device)
    unit = sample if len(route.group) > 1 else torch.zeros_like(sample)
    return route.group.to(sample.device)[unit], route.gates.to(sample.device)[unit]


def _sizes(
    projected: Tensor,  # (..., R)
    output_gram: Tensor,  # (R, R)
) -> Tensor:  # (...)
    """‖m Vᵀ‖ from m and VᵀV."""
    return torch.einsum("...q,qr,...r->...", projected, output_gram, projected).clamp_min(0).sqrt()
