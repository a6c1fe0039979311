"""Several LoRA adapters of one base model as the experts of one Tucker adapter.

Shape legend: K groups (LoRAs), D input and O output features of a layer, R rank of its experts (see `tucka.ops`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Optional, Union

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from tqdm import tqdm

from ..apply import apply
from ..config import TuckAConfig
from ..layer import linear_features
from ..model import dispatchers_of, layers_of
from ..ranks.families import pattern_for
from ..state import FILE_PREFIX
from ..towers import SHARED_INPUT_METHODS
from .joint import Joint, join
from .reading import LoraFile, Sources, Update, choose_heads, read_loras
from .report import Import, LayerImport
from .seeding import Groups, Labelled, Seeding, labelled, seed_routers

logger = logging.getLogger(__name__)

EXACT = 1e-5
"""Relative error above which an import without a given rank is reported as not exact."""

FIELDS = (
    "routing", "affinity", "temperature", "pooling", "components", "pool_padding", "pool_answers", "router_module",
    "balance_bias", "balance_rate", "sync_route", "trainable", "shared_expert",
)  # fmt: skip
"""Fields of `TuckAConfig` that a caller may set; what experts are is given by the LoRAs."""

SET = dict(
    t=1, p=1, alpha=1.0, form="additive", normalize=False, share_factors=False, shared_expert=False,
    init_router="kmeans", init_experts="identity", block_size=None, trained_columns=None,
    axis_block_size=None, trainable="all",
)  # fmt: skip
"""Fields that LoRAs imply: any other normalisation bounds cores, blocks leave parts of them out, and shared factors are
those of one layer."""


def from_loras(
    base_model: nn.Module,
    loras: Sources,
    *,
    rank: int | None = None,
    samples: Union[Mapping[str, Iterable[Any]], Iterable[Any], None] = None,
    groups: Optional[Groups] = None,
    samples_each: int = 128,
    head_of: str | None = None,
    check_base: bool = True,
    adapter_name: str = "default",
    progress: bool = True,
    **fields: Any,
) -> tuple[PeftModel, Import]:
    """Make several LoRA adapters of one base model the experts of one Tucker adapter.

    LoRA i becomes group i, of one expert. In every layer that any of them adapts, one U spans their row spaces and one
    V their column spaces (joint truncated HOSVD, improved by HOOI, of the stacked updates, which are never formed), and
    a core of R×R says what each is. A LoRA that leaves a layer alone has a zero core there.

    **What is exact.** Without `rank`, experts equal the updates α/r·B·A (rslora: α/√r) to single precision, provided
    that in every layer the ranks of all LoRAs together do not exceed the layer's widths; `Import.error` says it.
    Outputs then equal those of LoRA i under ``tucka.pin_route(model, report.route(i))``, whose gates are 1. A router
    multiplies an update by the sample's gate, a softmax over the LoRAs; the temperature is chosen so that the gate of
    95 % of the samples is at least 0.999, as far as the router can tell them apart; `Import.seeding` measures it.

    Parameters
    ----------
    base_model : Module
        The model the LoRAs were trained on, without adapters; it is adapted in place, as PEFT does.
    loras : dict of {name: directory}, or sequence of directories
        Adapters that PEFT has saved (safetensors; pickles are refused), or their ids on the Hub.
    rank : int, optional
        Largest rank R of any layer. To spend a budget instead, import without it and call `tucka.truncate`.
    samples : dict of {name: loader}, sequence of loaders, or one loader, optional
        Batches that the model takes, of each LoRA's data, to seed the router. Without them the router stays unseeded:
        pin routes, or call `tucka.initialize`.
    groups : str or sequence, optional
        With one loader for all: the key of a batch that holds the LoRA (name or index) of each sample, which the model
        is then not given; or the LoRAs of all samples in their order.
    samples_each : int
        How many samples of each LoRA to read, about; from one loader, as many in all.
    head_of : str, optional
        The LoRA whose `modules_to_save` are taken, where they differ.
    check_base : bool
        Refuse LoRAs that name different base models.
    adapter_name : str
        Name of the Tucker adapter.
    progress : bool
        Show a progress bar.
    **fields
        Of `TuckAConfig`, for the router: routing, affinity ("cosine", "distance"), temperature (instead of the chosen
        one), pooling, components, pool_padding, pool_answers, router_module, balance_bias, balance_rate, sync_route;
        and trainable ("core": U and V are held), shared_expert (True: the LoRAs' mean update is always active, and the
        cores hold what each differs by, so that a sample between LoRAs has something between them).

    Returns
    -------
    (peft.PeftModel, Import)
        The adapted model, and the error of every layer with the measures of the router.

    Raises
    ------
    ValueError
        If the adapters are no plain LoRAs of one base and of this model, hold what experts cannot carry (DoRA, biases,
        embeddings, convolutions, …) or different heads; if arguments do not fit. The model is then as it was.

    Notes
    -----
    DeBERTa applies layers to positions that all samples share: with ``routing="sample"`` these get no routed update, so
    LoRAs of its attention are exact with ``routing="batch"`` alone; a warning says so.

    Examples
    --------
    >>> model, report = tucka.from_loras(base, {"law": "loras/law", "code": "loras/code"})  # doctest: +SKIP
    >>> with tucka.pin_route(model, report.route("code", "law")):  # doctest: +SKIP
    ...     model(**batch_of_two)
    """
    if isinstance(base_model, PeftModel):
        raise ValueError("the model is wrapped already; give the base model that the LoRAs were trained on")
    _check_arguments(rank, samples, groups, samples_each, fields)
    files = read_loras(base_model, loras, check_base)
    names = [file.name for file in files]
    streams = None if samples is None else labelled(names, samples, groups)
    heads = choose_heads(files, head_of)
    joints = _join(base_model, files, rank, progress)
    config = _configuration(base_model, files, joints, heads, fields)
    trainable = [(parameter, parameter.requires_grad) for parameter in base_model.parameters()]
    model = apply(base_model, config, adapter_name=adapter_name)
    try:
        _write_experts(model, joints, adapter_name)
        _write_heads(model, heads, adapter_name)
        seeding = _seed(model, adapter_name, streams, samples_each, "temperature" not in fields, progress)
    except BaseException:
        model.unload()
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
    lines = tuple(LayerImport(layer, joint.rank, joint.errors) for layer, joint in joints.items())
    used: Any = model.peft_config[adapter_name]
    report = Import(tuple(names), lines, tuple(dispatchers_of(model, adapter_name)), seeding, used.temperature)
    _warn(model, files, report, exact=rank is None)
    return model, report


def _check_arguments(rank: Any, samples: Any, groups: Any, samples_each: Any, fields: dict[str, Any]) -> None:
    for name, value in (("rank", 1 if rank is None else rank), ("samples_each", samples_each)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a whole number of at least 1")
    if groups is not None and (samples is None or isinstance(samples, Mapping)):
        raise ValueError("groups say whose the samples of one loader are; give that loader as samples")
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise ValueError(f"{unknown[0]} cannot be set: the LoRAs say what the experts are; {', '.join(FIELDS)} can")
    if fields.get("affinity") == "paper":
        raise ValueError("affinity='paper' gives one expert in a group a gate of σ(±1), whatever the sample")


def _join(model: nn.Module, files: list[LoraFile], rank: int | None, progress: bool) -> dict[str, Joint]:
    """The experts of every layer that a LoRA adapts, in the order of the model."""
    norms = [sum(update.norm() ** 2 for update in file.updates.values()) ** 0.5 for file in files]
    weights = [1 / (norm or 1.0) for norm in norms]
    layers = [layer for layer, _ in model.named_modules() if any(layer in file.updates for file in files)]
    joints = {}
    for layer in tqdm(layers, desc="joining LoRAs", unit=" layers", disable=not progress, leave=False):
        nothing = Update.zero(*(linear_features(model.get_submodule(layer)) or (0, 0)))
        joints[layer] = join([file.updates.get(layer, nothing) for file in files], weights, rank)
    return joints


# --- the adapter -----------------------------------------------------------------------------------------------------


def _configuration(
    model: nn.Module, files: list[LoraFile], joints: dict[str, Joint], heads: dict[str, Any], fields: dict[str, Any]
) -> TuckAConfig:
    usual = Counter(joint.rank for joint in joints.values()).most_common(1)[0][0]
    tasks = {file.config.task_type for file in files}
    return TuckAConfig(
        r=usual,
        k=len(files),
        rank_pattern={pattern_for(layer): j.rank for layer, j in joints.items() if j.rank != usual} or None,
        target_modules=targets_for(model, list(joints)),
        modules_to_save=list(heads) or None,
        task_type=tasks.pop() if len(tasks) == 1 else None,
        **{**SET, **fields},
    )


def targets_for(model: nn.Module, layers: list[str]) -> Any:
    """`target_modules` that match these layers and no others: the ends of their names, or a regular expression."""
    ends = {layer.rpartition(".")[2] for layer in layers}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends) if matched == set(layers) else "|".join(map(re.escape, layers))


@torch.no_grad()
def _write_experts(model: nn.Module, joints: dict[str, Joint], adapter_name: str) -> None:
    for layer in layers_of(model):
        experts: Any = layer.tucka_experts[adapter_name]
        joint, core, shared = joints[layer.name], joints[layer.name].core, None
        if experts.shared_core is not None:
            shared = core.mean((0, 1))
            core = core - shared
        experts.write_(core, torch.ones(1, 1), joint.input_factor, joint.output_factor, shared)


def _write_heads(model: nn.Module, heads: dict[str, dict[str, Tensor]], adapter_name: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            held: Any = module.modules_to_save[adapter_name]
            held.load_state_dict(heads.get(name.removeprefix(FILE_PREFIX), {}), strict=False)


def _seed(
    model: nn.Module,
    adapter_name: str,
    streams: list[Labelled] | None,
    samples_each: int,
    choose_temperature: bool,
    progress: bool,
) -> dict[str, Seeding]:
    if streams is None:
        return {}
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    limit = samples_each * config.k // len(streams)
    return seed_routers(model, adapter_name, streams, limit, choose_temperature, progress)


def _warn(model: PeftModel, files: list[LoraFile], report: Import, exact: bool) -> None:
    """Log what a user should know and no error says."""
    held: Any = model.get_base_model()
    known, named = str(vars(held).get("name_or_path") or ""), str(files[0].config.base_model_name_or_path or "")
    if known and named and known != named:
        logger.warning("the LoRAs were trained on %r, the model is %r", named, known)
    worst = max(report.layers, key=lambda line: max(line.errors))
    if exact and report.error > EXACT:
        logger.warning(
            "the ranks of the LoRAs together exceed the widths of layer %r: the relative error of its experts is %.1e",
            worst.layer,
            report.error,
        )
    config: Any = model.active_peft_config
    if config.routing == "sample" and any(type(module).__name__ in SHARED_INPUT_METHODS for module in held.modules()):
        logger.warning(
            "layers of this model act on what all samples share, and there get no update: use routing='batch'"
        )
    unseeded = [tower for tower in report.towers if tower not in report.seeding]
    if unseeded and len(report.names) > 1:
        where = f" of {unseeded[0]!r}" if unseeded[0] else ""
        logger.warning("no samples seeded the router%s: use tucka.pin_route(model, report.route(…))", where)
