"""Multilinear spectra of the calibration tensors of every layer, before anything is trained.

The tensors are those that experts start from (`tucka.moments`): the activation tensor 𝒳[i,j] = E[x zᵀ | cluster i,j] or
the gradient tensor 𝒴[i,j] = E[(∂ℓ/∂z) xᵀ | cluster i,j]. Singular values of a mode are those of the unfolding along it
(De Lathauwer, De Moor and Vandewalle 2000, "A multilinear singular value decomposition").

Shape legend: K groups, T experts in a group, D and O the D-modes, P and R ranks, M the largest rank looked at (see
`tucka.ops`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import tensorly as tl
import torch
from peft import TaskType
from torch import Tensor, nn

from ..apply import default_config
from ..calibration import Loss, as_found, bare
from ..config import TuckAConfig
from ..hosvd import leading_vectors
from ..initialization import MomentCollector, clusters_of, read_features, read_moments, start_routers
from ..layer import TuckALayer
from ..model import TuckAModel, dispatchers_of, layers_of, single_adapter_name
from ..moments import Moments
from ..ops import safe_norm
from .families import Family, families_of, router_parameters

MODES = ("group", "expert", "input", "output")
"""The modes of an expert tensor, of sizes K, T, D and O."""

HEADS: dict[str, list[str]] = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
"""Heads that PEFT trains whole for a task, which are then no layers to adapt."""


class LayerSpectrum(NamedTuple):
    """The tensor of one layer."""

    layer: str
    values: dict[str, Tensor]  # singular values by mode, largest first
    kept: Tensor  # (P', M) share of the energy that a HOSVD of ranks p = 1, … and r = 1, … keeps

    def effective_rank(self, mode: str) -> float:
        """exp(−Σ s log s) of the shares s of σ²: n for n equal values; nan without energy (Roy and Vetterli 2007)."""
        squares = self.values[mode].double().square()
        return float(torch.special.entr(squares / squares.sum()).sum().exp()) if squares.sum() > 0 else math.nan

    def rank_for(self, energy: float, mode: str) -> int:
        """The least number of singular values of a mode that hold a share of Σσ²; 0 without energy."""
        squares = self.values[mode].double().square()
        if not squares.sum() > 0:
            return 0
        return int((squares.cumsum(0) / squares.sum() < energy - 1e-12).sum()) + 1


class Spectra(NamedTuple):
    """The tensors of all layers of a base model; `str` of it is a table."""

    tensor: str  # "activation" or "gradient"
    layers: tuple[LayerSpectrum, ...]

    def __getitem__(self, key: Any) -> Any:
        """The layer of that name."""
        found = [layer for layer in self.layers if layer.layer == key] if isinstance(key, str) else None
        if found == []:
            raise KeyError(f"{key!r} is none of {len(self.layers)} layers, {self.layers[0].layer!r} the first of them")
        return tuple.__getitem__(self, key) if found is None else found[0]

    def __str__(self) -> str:
        width = max(len(line.layer) for line in self.layers)
        lines = [f"{self.tensor} tensor; effective rank by mode, and ranks r and p for 90 % of the energy"]
        lines += [f"{'layer':{width}} " + "".join(f"{mode:>9}" for mode in MODES) + "    r    p"]
        for x in self.layers:
            ranks = "".join(f"{x.effective_rank(mode):9.2f}" for mode in MODES)
            r = max(x.rank_for(0.9, "input"), x.rank_for(0.9, "output"))
            lines.append(f"{x.layer:{width}} {ranks}{r:5}{x.rank_for(0.9, 'expert'):5}")
        return "\n".join(lines)


class Measured(NamedTuple):
    """One family, its layers' spectra, and the energies of their tensors."""

    family: Family
    layers: tuple[LayerSpectrum, ...]
    energies: tuple[float, ...]  # ‖𝒴‖² of every layer


def spectra(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    config: TuckAConfig | None = None,
    adapter_name: str | None = None,
    samples: int = 512,
    loss: Loss | None = None,
    max_rank: int = 64,
    progress: bool = False,
) -> Spectra:
    """Multilinear singular values of the calibration tensor of every layer, and the energy that ranks keep.

    Parameters
    ----------
    model : Module
        A model to adapt, or an adapted one, whose base model is then measured; it is left as found.
    calibration : iterable
        Batches the model takes, as in `tucka.initialize`.
    config : TuckAConfig, optional
        For a model that is not adapted: the layers, clusters and form to look at, and which tensor: the gradient's for
        ``init_experts="gradient"``, else the activations'. Default: `tucka.apply.default_config`.
    adapter_name : str, optional
        For an adapted model; default: the active adapter.
    samples, loss, progress
        As in `tucka.initialize`.
    max_rank : int
        The largest rank to look at in layers too wide to form their tensor (which are sketched for it).

    Raises
    ------
    ValueError
        If there is no batch or no loss where one is needed, a tensor is not finite, or both a config and an adapted
        model are given.
    """
    with measured(model, calibration, config, adapter_name, samples, loss, max_rank, progress) as (families, used, _):
        found = {line.layer: line for family in families for line in family.layers}
        order = [layer.name for layer in layers_of(model) if layer.name in found]
    tensor = "gradient" if used.init_experts == "gradient" else "activation"
    return Spectra(tensor, tuple(found[name] for name in order))


@contextmanager
def measured(
    model: nn.Module,
    calibration: Iterable[Any],
    config: TuckAConfig | None,
    adapter_name: str | None,
    samples: int,
    loss: Loss | None,
    max_rank: int,
    progress: bool,
) -> Iterator[tuple[list[Measured], TuckAConfig, int]]:
    """Families, the configuration meant and the router's parameters, while the model is adapted."""
    if isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1:
        raise ValueError(f"max_rank={max_rank!r} is not a whole number of at least 1")
    with ExitStack() as stack:
        if layers_of(model):
            if config is not None:
                raise ValueError("the model is adapted, so its layers and clusters are its adapter's; leave config out")
            name = single_adapter_name(model, adapter_name)
            config = model.peft_config[name]  # type: ignore[assignment, index]
        else:
            name = "default"
            config = default_config(model) if config is None else config
            stack.enter_context(_adapted_meanwhile(model, config, name))
        assert config is not None
        families = _measure(model, calibration, config, name, samples, loss, max_rank, progress)
        yield families, config, router_parameters(model, name)


@contextmanager
def _adapted_meanwhile(model: nn.Module, config: TuckAConfig, name: str) -> Iterator[None]:
    """Adapt a model with rank 1, and take everything off again."""
    config = copy.deepcopy(config)
    heads = HEADS.get(config.task_type, []) if config.task_type else []
    config.modules_to_save = [*(config.modules_to_save or []), *heads] or None
    config.r, config.rank_pattern, config.init_experts, config.bias = 1, None, "identity", "none"
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    held = set(vars(model))
    drawn = torch.random.get_rng_state()
    try:
        tuner = TuckAModel(model, config, name)
        try:
            yield
        finally:
            tuner.unload()
    finally:
        for attribute in set(vars(model)) - held:
            delattr(model, attribute)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
        torch.random.set_rng_state(drawn)


def _measure(
    model: nn.Module,
    calibration: Iterable[Any],
    config: TuckAConfig,
    name: str,
    samples: int,
    loss: Loss | None,
    max_rank: int,
    progress: bool,
) -> list[Measured]:
    layers = [layer for layer in layers_of(model) if name in layer.tucka_experts]
    routers = {tower: dispatcher.router(name) for tower, dispatcher in dispatchers_of(model, name).items()}
    before = {tower: router.snapshot() for tower, router in routers.items()}
    try:
        with as_found(model), bare(layers_of(model)):
            batches, features = read_features(model, layers, name, calibration, samples, progress)
            if any(router.awaits_start for router in routers.values()):
                start_routers(model, layers, name, config, batches[0], features)
            clusters = {tower: clusters_of(routers[tower], feature) for tower, feature in features.items()}
            collector = MomentCollector(layers, name, config, clusters, max_rank)
            read_moments(model, layers, batches, collector, config, loss, progress)
            return [_measured(family, collector.moments, max_rank) for family in families_of(model, name)]
    finally:
        for tower, router in routers.items():
            router.restore(before[tower])


def _measured(family: Family, moments: dict[TuckALayer, Moments], max_rank: int) -> Measured:
    """Spectra of the layers of a family, with common factors; a layer that was not reached has no energy."""
    slices = [_slices(layer, experts, moments) for layer, experts in zip(family.layers, family.experts)]
    rank = min(max_rank, family.widest)
    with torch.no_grad(), tl.backend_context("pytorch", local_threadsafe=True):
        scaled = [(left, right, core / safe_norm(core)) for left, right, core in slices]
        u = _leading(scaled, (0,), rank) if not family.tied else _leading(scaled, (0, 1), rank)
        v = u if family.tied else _leading(scaled, (1,), rank)
        lines, energies = [], []
        for layer, (left, right, core) in zip(family.layers, slices):
            if not bool(core.isfinite().all()):
                raise ValueError(f"the tensor of layer {layer.name!r} is not finite")
            values = {mode: _singular_values(core, index) for index, mode in enumerate(MODES)}
            seen = tl.tenalg.multi_mode_dot(core, [u.mT @ left, v.mT @ right], modes=[2, 3])
            experts = leading_vectors([tl.unfold(seen, 1)], core.shape[1])
            squares = tl.tenalg.mode_dot(seen, experts.mT, 1).square().sum(0)  # (T, M, M)
            energy = float(core.square().sum())
            kept = squares.cumsum(0).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2) / (energy or 1.0)
            lines.append(LayerSpectrum(layer.name, values, kept.cpu()))
            energies.append(energy)
    return Measured(family, tuple(lines), tuple(energies))


def _slices(layer: TuckALayer, experts: Any, moments: dict[TuckALayer, Moments]) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal bases (D, d) and (O, o) of a layer's moments, and their tensor (K, T, d, o), in float64."""
    shape = tuple(experts.shape[:2])
    if layer not in moments:
        left, right = (
            factor.new_zeros(len(factor), 1).double() for factor in (experts.input_mode, experts.output_mode)
        )
        return left, right, left.new_zeros(*shape, 1, 1)
    held = moments[layer]
    left, right = (_orthonormal(held.side(mode)) for mode in (0, 1))
    within = held.within(left.to(held.side(0)), right.to(held.side(0)))
    return left, right, within.unflatten(0, shape).double()


def _orthonormal(side: Tensor) -> Tensor:
    side = side.double()
    return side if side.shape[0] == side.shape[1] else torch.linalg.qr(side).Q


def _leading(scaled: list[tuple[Tensor, Tensor, Tensor]], modes: tuple[int, ...], rank: int) -> Tensor:
    """The first left singular vectors of the unfoldings of all layers along D-modes."""
    sides = []
    for parts in scaled:
        for mode in modes:
            unfolded = tl.unfold(parts[2], mode + 2)
            # A square root of the Gram matrix: as few columns as the basis has.
            values, vectors = torch.linalg.eigh(unfolded @ unfolded.mT)
            sides.append(parts[mode] @ (vectors * values.clamp_min(0).sqrt()))
    return leading_vectors(sides, rank)


def _singular_values(core: Tensor, mode: int) -> Tensor:
    unfolded = tl.unfold(core, mode)
    squares = torch.linalg.eigvalsh(unfolded @ unfolded.mT)
    return squares.clamp_min(0).sqrt().flip(0).cpu()
