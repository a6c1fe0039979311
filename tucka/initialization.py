"""Starts from data: one pass for the routing features, one for the tensors that the experts start from.

Shape legend: B samples of a batch, N samples in all, F length of a routing feature, K groups, T experts in a group.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import FeatureReader, Loss, Rows, as_found, bare, device_of, listening, progress_bar, run_batch
from .config import TuckAConfig
from .hosvd import Decomposition, hosvd_of_moments
from .layer import TuckALayer
from .model import dispatchers_of, layers_of, single_adapter_name
from .moments import FORMED_LIMIT, FormedMoments, GaussianTests, Moments, SketchedMoments
from .processes import is_distributed, is_sharded, raising_together, require_all_well
from .routing import Router
from .starts import start_experts_from, start_router_from, starts_experts_from_data, starts_from_data

CHUNK = 2048
"""Rows that are added at once: copies in float32 of wide activations stay small."""

LOSS_SCALE = 2.0**10
"""What the loss is multiplied by before its backward, and gradients divided by after: those of a mean over thousands of
tokens would vanish in half precision. A power of two changes no digit elsewhere."""

logger = logging.getLogger(__name__)


def initialize(
    model: nn.Module,
    calibration: Iterable[Any],
    adapter_name: str | None = None,
    *,
    samples: int = 512,
    loss: Loss | None = None,
    progress: bool = True,
) -> None:
    """Start a wrapped model from data, as its configuration says (`init_router`, `init_experts`).

    A first pass reads the routing features, up to the router's layer; a second one, for `init_experts` "hosvd" or
    "gradient", the moments of every layer of the base model. No activation is kept beyond its batch. The model's modes,
    hooks, gradients and random state are left as found, also when a batch raises, and then its parameters are too.
    In a distributed run every process calls this, and all get the first one's start.

    Parameters
    ----------
    model : PeftModel
        A model that `tucka.apply` or `peft.get_peft_model` has wrapped.
    calibration : iterable
        Batches the model takes: mappings, tuples of positional arguments, or single tensors. Batches are read until
        they hold `samples` samples; they are kept for the second pass, so the iterable is read once.
    adapter_name : str, optional
        The adapter to start; default: the active one.
    samples : int
        How many samples to read.
    loss : callable, optional
        Takes a model's output and the batch and returns the loss, for "gradient"; default: ``output.loss``.
    progress : bool
        Show a progress bar.

    Raises
    ------
    ValueError
        If there is no batch, or no such adapter, or it does not start from data; if there are fewer samples than
        experts; if "gradient" has no loss, or a moment is not finite; if the model is sharded already.
    OtherProcessError
        In every other process of a distributed run, if one of them raised.
    """
    name = single_adapter_name(model, adapter_name)
    layers = [layer for layer in layers_of(model) if name in layer.tucka_form]
    config: TuckAConfig = model.peft_config[name]  # type: ignore[assignment, index]
    routers = {tower: dispatcher.router(name) for tower, dispatcher in dispatchers_of(model, name).items()}
    starts_experts = starts_experts_from_data(config)
    if not starts_from_data(config):
        raise ValueError(
            f"adapter {name!r} starts without data: init_router={config.init_router!r} and "
            f"init_experts={config.init_experts!r} read none"
        )
    wanted = samples if starts_experts or config.init_router != "perturb" else 1
    if any(is_sharded(layer.experts_of(name).core) for layer in layers):
        raise ValueError(f"adapter {name!r} is sharded over processes (FSDP); start it before the model is sharded")
    with as_found(model), bare(layers_of(model)), _all_or_nothing(routers.values()), raising_together():
        batches, features = read_features(model, layers, name, calibration, wanted, progress)
        start_routers(model, layers, name, config, batches[0], features)
        if starts_experts:
            clusters = {tower: clusters_of(routers[tower], feature) for tower, feature in features.items()}
            carriers = [layer for layer in layers if name in layer.tucka_experts]
            collector = MomentCollector(carriers, name, config, clusters)
            read_moments(model, layers, batches, collector, config, loss, progress)
            decompositions = collector.decompositions()
            require_all_well()  # all write, or none
            for layer, found in decompositions:
                start_experts_from(layer.tucka_experts[name], found, config)  # type: ignore[arg-type]
    _share_start(layers, name)


@contextmanager
def _all_or_nothing(routers: Iterable[Router]) -> Iterator[None]:
    """Put routers back as they were if what follows raises."""
    before = [(router, router.snapshot()) for router in routers]
    try:
        yield
    except BaseException:
        for router, snapshot in before:
            router.restore(snapshot)
        raise


def read_features(
    model: nn.Module, layers: list[TuckALayer], name: str, calibration: Iterable[Any], samples: int, progress: bool
) -> tuple[list[Any], dict[str, Tensor]]:
    """Batches of (at least) so many samples, and the features of every tower that saw them, (N, F)."""
    reader, batches, seen, device = FeatureReader(layers, name, per_sample=True), [], 0, device_of(model)
    with progress_bar(samples, "routing", progress) as bar:
        for batch in calibration:
            units = reader.read(model, batch, device)
            batches.append(batch)
            seen += units
            bar.update(min(units, samples - bar.n))
            if seen >= samples:
                break
    if not batches:
        raise ValueError("calibration yields no batch; the start needs one")
    return batches, {tower: torch.cat(parts) for tower, parts in reader.features.items() if parts}


def start_routers(
    model: nn.Module,
    layers: list[TuckALayer],
    name: str,
    config: TuckAConfig,
    batch: Any,
    features: dict[str, Tensor],  # (N, F), by tower
) -> None:
    """Start the routers of an adapter as it is configured: "perturb" from the first batch, k-means from features."""
    routers = {tower: dispatcher.router(name) for tower, dispatcher in dispatchers_of(model, name).items()}
    if config.init_router == "perturb":
        _perturb(model, layers, name, routers, batch, config.routing == "sample")
    elif config.init_router != "kaiming":
        for tower, feature in features.items():
            start_router_from(routers[tower], feature)


def _perturb(
    model: nn.Module, layers: list[TuckALayer], name: str, routers: dict[str, Router], batch: Any, per_sample: bool
) -> None:
    """The paper's start, from the first batch as it is routed."""
    reader = FeatureReader(layers, name, per_sample=per_sample)
    require_all_well()  # a route of the global batch adds up what the processes hold
    reader.read(model, batch, device_of(model))
    for tower, features in reader.features.items():
        if features:
            routers[tower].initialised.fill_(False)
            routers[tower].start(features[0])


def clusters_of(
    router: Router,
    features: Tensor,  # (N, F)
) -> Tensor:  # (N,) cluster i·T + j of every sample
    """The group that a router chooses, and the expert of the largest gate in it."""
    with torch.no_grad():
        route = router(features)
    assert route.gates is not None
    return route.group * router.config.t + route.gates.argmax(-1)


def read_moments(
    model: nn.Module,
    layers: list[TuckALayer],
    batches: list[Any],
    collector: MomentCollector,
    config: TuckAConfig,
    loss: Loss | None,
    progress: bool,
) -> None:
    """Run batches and let a collector hear the activations of every layer, or the gradients of the loss."""
    gradients, device = config.init_experts == "gradient", device_of(model)
    heard = listening(layers, config.form == "additive", gradients, collector.hear)
    bar = progress_bar(len(batches), config.init_experts, progress, unit=" batches")
    with heard, bar, torch.set_grad_enabled(gradients):
        for batch in batches:
            output = run_batch(model, batch, device)
            if gradients:
                (_loss_of(output, batch, loss) * LOSS_SCALE).backward()
            collector.next_batch()
            bar.update()
    if gradients:
        _check_reached(collector.layers, collector.moments)


def _loss_of(output: Any, batch: Any, loss: Loss | None) -> Tensor:
    value = loss(output, batch) if loss is not None else getattr(output, "loss", None)
    if not isinstance(value, Tensor):
        raise ValueError(
            "init_experts='gradient' needs a loss, but the model's output has none: give batches with labels, or "
            "loss=function(output, batch)"
        )
    if not value.requires_grad:
        raise ValueError(
            "the loss does not depend on any adapted layer (with reentrant checkpointing, call "
            "enable_input_require_grads() first; quantised layers that round their inputs pass no gradient on)"
        )
    return value


def _check_reached(layers: list[TuckALayer], reached: Container[TuckALayer]) -> None:
    missed = [layer.name for layer in layers if layer not in reached]
    if len(missed) == len(layers):
        raise ValueError(
            f"no gradient reached any of the {len(layers)} adapted layers: what lies between them and the loss passes "
            "none on, as do quantised layers that round their inputs"
        )
    if missed:
        logger.warning(
            "no gradient reached %d of %d adapted layers, %r among them: they did not run, or a layer between them and "
            "the loss passes none on. They start without data",
            len(missed),
            len(layers),
            missed[0],
        )


class MomentCollector:
    """Hears the layers of a model and gathers what their experts start from.

    Parameters
    ----------
    layers : list of TuckALayer
    adapter_name : str
    config : TuckAConfig
    clusters : dict
        Cluster of every sample, (N,), by tower; an expectation over the samples of a cluster weighs each alike.
    rank : int, optional
        Largest rank that sketches are to tell; default: that of each layer's experts.
    """

    def __init__(
        self,
        layers: list[TuckALayer],
        adapter_name: str,
        config: TuckAConfig,
        clusters: dict[str, Tensor],
        rank: int | None = None,
    ) -> None:
        self.rank = rank
        self.layers, self.name, self.config, self.clusters = layers, adapter_name, config, clusters
        self.moments: dict[TuckALayer, Moments] = {}
        self._tests = GaussianTests()
        self._start = dict.fromkeys(clusters, 0)  # samples of the batches before this one, by tower
        self._size = dict.fromkeys(clusters, 0)

    def hear(self, layer: TuckALayer, x: Tensor, z: Tensor, rows: Rows) -> None:
        """Add one call of a layer: inputs x (rows, D), activations or gradients z (rows, D or O).

        Layers that share an adapted input add to the same tensor: its gradient is the sum of what they send back.
        """
        layer = layer.tucka_input_of.get(self.name, layer)
        tower = layer.dispatcher.name
        if layer not in self.moments:
            self.moments[layer] = self._new(layer, x.shape[-1], z.shape[-1])
        samples = int(rows.sample[-1]) + 1 if len(rows.sample) else 0
        self._size[tower] = samples
        if not layer.tucka_routed[self.name]:
            cluster_N = rows.sample.new_zeros(len(self.clusters[tower]))
        else:
            cluster_N = self.clusters[tower].to(x.device)
        cluster_B = cluster_N[self._start[tower] : self._start[tower] + samples]
        weight_B = 1 / cluster_N.bincount().clamp_min(1)[cluster_B]
        if self.config.init_experts == "gradient":
            weight_B = weight_B * (samples / LOSS_SCALE)  # a loss is a mean over the samples of its batch
        else:
            weight_B = weight_B / rows.sample[rows.keep].bincount(minlength=samples).clamp_min(1)
        sample = rows.sample[rows.keep]
        parts = (x[rows.keep], z[rows.keep], cluster_B[sample], weight_B[sample])
        for chunk in zip(*(part.split(CHUNK) for part in parts)):
            self.moments[layer].add(*chunk)

    def next_batch(self) -> None:
        """Go on to the next batch."""
        for tower, size in self._size.items():
            self._start[tower] += size
        self._size = dict.fromkeys(self.clusters, 0)

    def _new(self, layer: TuckALayer, d: int, o: int) -> Moments:
        experts: Any = layer.tucka_experts[self.name]
        clusters = experts.shape[0] * experts.shape[1]
        placed = dict(device=experts.core.device, dtype=experts.core.dtype)
        if d * o <= FORMED_LIMIT:
            return FormedMoments(clusters, d, o, **placed)
        rank = experts.rank[-1] if self.rank is None else min(self.rank, d, o)
        return SketchedMoments(clusters, d, o, rank, self._tests, **placed)

    def decompositions(self) -> list[tuple[TuckALayer, Decomposition]]:
        """Truncated HOSVD of every layer that was heard; layers that share factors are decomposed together.

        Raises
        ------
        ValueError
            If a moment is not finite.
        """
        found: list[tuple[TuckALayer, Decomposition]] = []
        for family in self._families():
            sizes = {layer: self.moments[layer].size() for layer in family}
            for layer, size in sizes.items():
                if not math.isfinite(size):
                    raise ValueError(f"the {self.config.init_experts} tensor of layer {layer.name!r} is not finite")
            if not any(sizes.values()):
                logger.info(
                    "layer %r has a zero %s tensor: it starts without", family[0].name, self.config.init_experts
                )
                continue
            tensors: list[Any] = [layer.tucka_experts[self.name] for layer in family]
            parts = hosvd_of_moments(
                [self.moments[layer] for layer in family],
                [tuple(experts.shape[:2]) for experts in tensors],
                [tuple(experts.core.shape[1:3]) for experts in tensors],
                tied=tensors[0].tied,
            )
            found += zip(family, parts)
        return found

    def _families(self) -> list[list[TuckALayer]]:
        """Layers that were heard, those that share factors together."""
        families: dict[int, list[TuckALayer]] = {}
        for layer in self.layers:
            if layer in self.moments:
                experts: Any = layer.tucka_experts[self.name]
                families.setdefault(id(experts.owner), []).append(layer)
        return list(families.values())


def _share_start(layers: list[TuckALayer], name: str) -> None:
    """Give every process of a distributed run the first one's start."""
    if not is_distributed():
        return
    for layer in layers:
        held = [modules[name] for modules in (layer.tucka_experts, layer.tucka_router) if name in modules]
        for value in (value for module in held for value in module.state_dict().values()):
            torch.distributed.broadcast(value, 0)
