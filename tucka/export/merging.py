"""Merging: a fixed route folded into the base weights, by PEFT's LoRA layers, so for every storage PEFT can merge."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, Optional

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..calibration import as_found
from ..layer import TuckALayer
from ..model import TuckAModel, dispatchers_of, layers_of, single_adapter_name
from .exactness import warn_of_shared_input
from .factors import LowRank, low_rank_updates
from .measurement import Candidate, OutputError, output_errors, ratio, relative_error, run
from .routes import FixedRoute, Observed, RouteLike, fixed_routes, is_constant, observe, quietly, require_active
from .weights import DENSE, stored_weight

logger = logging.getLogger(__name__)

ADAPTER = "merged"


class LayerMerge(NamedTuple):
    """Rounding of one merged weight, W' stored for W + Δ; None where the storage does not show its weight."""

    layer: str
    weight_error: Optional[float]  # ‖W' − (W + Δ)‖ / ‖W + Δ‖
    update_error: Optional[float]  # ‖W' − (W + Δ)‖ / ‖Δ‖: 1 is an update lost


class MergeReport(NamedTuple):
    """What a merge did, and what it cost."""

    layers: tuple[LayerMerge, ...]
    routes: dict[str, FixedRoute]  # by tower
    error: Optional[OutputError]  # of holding the route, over the loader's samples
    merged_error: Optional[float]  # of the merged model's outputs on the loader's first batch, rounding included
    inexact_layers: tuple[str, ...]  # also applied to relative positions

    def __str__(self) -> str:
        sources = ", ".join(f"{tower or 'model'}: {route.source}" for tower, route in self.routes.items())
        lines = [f"merged {len(self.layers)} layers at a fixed route ({sources})"]
        worst = max(self.layers, key=lambda line: line.update_error or 0.0)
        if worst.update_error is not None:
            lines.append(f"largest rounding: {worst.update_error:.2e} of the update, in {worst.layer}")
        if self.error is not None:
            lines.append(
                f"output error of the fixed route: {self.error.outputs:.2e}, {self.error.update:.2e} of what the "
                f"experts change ({self.error.samples} samples); merged, on the first batch: {self.merged_error:.2e}"
            )
        return "\n".join(lines)


def merge(
    model: PeftModel | TuckAModel,
    route: RouteLike | Mapping[str, RouteLike] | None = None,
    loader: Iterable[Any] | None = None,
    *,
    adapter_name: str | None = None,
    samples: int = 512,
    safe_merge: bool = True,
    progressbar: bool = False,
) -> tuple[nn.Module, MergeReport]:
    """Fold a fixed route of the active adapter into the base weights, and give the base model back.

    Parameters
    ----------
    model : PeftModel
        The adapted model; afterwards it is used up, as after `PeftModel.unload`.
    route : int, Route, "mean", or a dict of these by tower, optional
        As in `tucka.to_lora`. It may be left out only where it is the same for all data: ``k=1, t=1`` with an affinity
        other than the paper's.
    loader : iterable, optional
        Batches the model takes, for "mean", for the mean gates of a group, and to measure what the merge costs.
    adapter_name : str, optional
        Default: the active adapter; it must be the only active one.
    samples : int
        How many samples of the loader to read.
    safe_merge : bool
        Merge copies of all weights before the first is put in place, so that whatever fails leaves the model as it was;
        that takes the adapted weights' memory once more. False: one layer after the other.
    progressbar : bool
        Show a progress bar.

    Returns
    -------
    Module, MergeReport
        The base model (with trained heads), and the report, which is logged as well.

    Raises
    ------
    ValueError
        If no route is given and it depends on data, the route does not fit, an update or a merged weight is not finite,
        or PEFT cannot merge into a layer; the message names the layer.
    """
    tuner: TuckAModel = model.base_model if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    name = single_adapter_name(tuner, adapter_name)
    _check_mergeable(tuner, name, route)
    base: nn.Module = tuner.model
    observed = None if loader is None else observe(base, name, loader, samples)
    only_group = dict.fromkeys(dispatchers_of(base, name), 0)
    routes = fixed_routes(base, name, only_group if route is None else route, observed)
    updates = low_rank_updates(base, name, routes)
    error, before = (None, None) if observed is None else _measured(base, name, updates, observed)
    inexact = warn_of_shared_input(base, name)
    lines = _swap_weights(base, updates, safe_merge, progressbar)
    merged = tuner._unload_and_optionally_merge(merge=True)
    merged_error = None if observed is None or before is None else _error_now(merged, observed, before)
    report = MergeReport(tuple(lines), routes, error, merged_error, inexact)
    logger.info("%s", report)
    return merged, report


def _check_mergeable(tuner: TuckAModel, name: str, route: Any) -> None:
    config: Any = tuner.peft_config[name]
    if route is None and not is_constant(config):
        reason = f"k={config.k} groups of t={config.t} experts"
        if config.k * config.t == 1:
            reason = "a single expert, but the gate of affinity='paper' is the sign of a logit"
        raise ValueError(
            f"Tucker experts cannot be merged: the update depends on the route of each forward ({reason}). Say which: "
            "merge_and_unload(route=group), merge_and_unload(route=recorded_route) or merge_and_unload(route='mean', "
            "loader=batches)"
        )
    require_active(tuner.model, name)


# --- measuring -----------------------------------------------------------------------------------------------------


def _measured(
    base: nn.Module, name: str, updates: dict[str, LowRank], observed: Observed
) -> tuple[OutputError | None, Tensor]:
    everyone = torch.ones(sum(observed.units), dtype=torch.bool)
    (error,) = output_errors(base, name, [Candidate(updates, everyone)], observed)
    with quietly(base, name):
        return error, run(base, observed.batches[0])


def _error_now(merged: nn.Module, observed: Observed, before: Tensor) -> float:
    with as_found(merged), torch.no_grad():
        outputs = run(merged, observed.batches[0])
    return relative_error(merged, observed.batches[0], outputs, before)


# --- merging -------------------------------------------------------------------------------------------------------


def _swap_weights(
    base: nn.Module, updates: Mapping[str, LowRank], safe_merge: bool, progressbar: bool
) -> list[LayerMerge]:
    """Replace every base layer by its merged copy; with `safe_merge` all at the end."""
    layers = layers_of(base)
    adapted = [layer for layer in layers if layer.name in updates]
    bar = tqdm(adapted, desc="merging", unit=" layers", disable=not progressbar, leave=False)
    merging: Iterable = _merged_layers(base, bar, updates)
    lines = []
    for layer, merged, line in list(merging) if safe_merge else merging:
        layer.base_layer = merged
        lines.append(line)
    for layer in layers:
        layer.merged_adapters = [ADAPTER]  # there is nothing left to merge
    return lines


def _merged_layers(
    base: nn.Module, layers: Iterable[TuckALayer], updates: Mapping[str, LowRank]
) -> Iterator[tuple[TuckALayer, nn.Module, LayerMerge]]:
    for layer in layers:
        old = layer.get_base_layer()
        if any(parameter.is_meta for parameter in old.parameters()):
            raise ValueError(f"layer {layer.name!r} cannot be merged: its weight is offloaded; load it onto a device")
        try:
            new = _merged_copy(old, updates[layer.name], base)
        except Exception as error:
            raise ValueError(f"layer {layer.name!r} cannot be merged: {error}") from error
        yield layer, new, _rounding(layer.name, old, new, updates[layer.name])


def _merged_copy(old: nn.Module, update: LowRank, base: nn.Module) -> nn.Module:
    """A copy of a base layer with the update in its weight: PEFT's LoRA on it, merged."""
    holder: Any = nn.ModuleDict({"layer": copy.deepcopy(old)})
    # What PEFT asks a model: how torchao's weights are made, and whether bitsandbytes' layers are to be known as such.
    holder.hf_quantizer = getattr(base, "hf_quantizer", None)
    holder.is_loaded_in_4bit = type(old).__name__ == "Linear4bit"
    holder.is_loaded_in_8bit = type(old).__name__ == "Linear8bitLt"
    rank = len(update.a)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"], fan_in_fan_out=isinstance(old, Conv1D))
    with torch.random.fork_rng(devices=[]):  # LoRA draws weights, which are overwritten
        lora: Any = LoraModel(holder, config, ADAPTER)
    target = holder["layer"]
    for part, value in ((target.lora_A, update.a), (target.lora_B, update.b)):
        part[ADAPTER].weight = nn.Parameter(value.to(part[ADAPTER].weight.device), requires_grad=False)
    new = lora.merge_and_unload()["layer"]
    for parameter, was in zip(new.parameters(), old.parameters()):
        parameter.requires_grad_(was.requires_grad)
    return new


@torch.no_grad()
def _rounding(name: str, old: nn.Module, new: nn.Module, update: LowRank) -> LayerMerge:
    before, after = stored_weight(old), stored_weight(new)
    shown = after if after is not None else new.state_dict().get("weight")
    if type(shown) is Tensor and shown.dtype in DENSE and not bool(shown.isfinite().all()):
        raise ValueError(f"layer {name!r} cannot be merged: its merged weight is not finite in {_stored_type(old)}")
    if before is None or after is None:
        return LayerMerge(name, None, None)
    # Single precision could not tell its own rounding.
    exact = torch.float64 if _stored_type(old) in (torch.float32, torch.float64) else torch.float32
    delta = update.b.to(before.device, exact) @ update.a.to(before.device, exact)
    wanted = before.to(exact) + delta
    error = float((after.to(exact) - wanted).norm())
    return LayerMerge(name, ratio(error, float(wanted.norm())), ratio(error, float(delta.norm())))


def _stored_type(layer: nn.Module) -> Optional[torch.dtype]:
    held = dict(chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False)))
    return held["weight"].dtype if "weight" in held else None
