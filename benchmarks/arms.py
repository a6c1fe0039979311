"""The methods that the quality benchmark compares, and their sizes.

"Sized" arms take the smallest size at which they train at least as many adapter parameters as TuckA's default.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from peft import HRAConfig, LilyConfig, LoraConfig, MissConfig, OFTConfig, PeftConfig, VeraConfig, get_peft_model
from peft import initialize_lora_eva_weights as start_eva
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tucka
from tucka import TuckAConfig
from tucka.starts import starts_from_data

from .fitting import GROUPS
from .sizing import adapter_parameters, smallest_size
from .tasks import Task

REFERENCE = dict(
    r=8, k=4, t=2, p=2, alpha=4.0, routing="sample", affinity="paper", pooling="mean_std", normalize=False,
    form="multiplicative", tie_factors=True, share_factors=False, shared_expert=True, trainable="all",
    init_router="perturb", init_experts="identity", perturb_scale=1.0, pool_padding=False, balance_bias=False,
    balance_rate=1e-3, temperature=0.1, warm_start=0.0, router_depth=0, components=0, block_size=None,
    trained_columns=None, axis_block_size=None, core_gain=3.0, axis_bound=None,
)  # fmt: skip
"""TuckA's settings that a row need not name. Rows record what differs from these, not from the library's defaults, so
that they keep their meaning when a default changes; never edit a value, only add fields that the library adds."""

WIDE: dict[str, Any] = {"alpha": 2.0, "core_gain": 3.0}
"""Cores that start half as fast again as the default's, and go twice as far."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "k1": {"k": 1},
    "k8": {"k": 8},
    "t1": {"t": 1},
    "t2": {"t": 2},
    "t2p2": {"t": 2, "p": 2},
    "r4": {"r": 4},
    "r8": {"r": 8},
    "r16": {"r": 16},
    "alpha1": {"alpha": 1.0},
    "alpha2": {"alpha": 2.0},
    "alpha4": {"alpha": 4.0},
    "alpha8": {"alpha": 8.0},
    "unnormalised": {"normalize": False},
    "bounded": {"normalize": "bounded"},
    "batch": {"routing": "batch"},
    "shared-factors": {"share_factors": True},
    "own-factors": {"share_factors": False},
    "multiplicative": {"form": "multiplicative"},
    "additive": {"form": "additive"},
    "no-shared-expert": {"shared_expert": False},
    "no-axes": {"axis_block_size": None},
    "axes1": {"axis_block_size": 1},
    "axes2": {"axis_block_size": 2},
    "axes4": {"axis_block_size": 4},
    "axes-alone": {"k": 1, "r": 4, "shared_expert": False},
    "trained-factors": {"trainable": "all"},
    "two-columns": {"trainable": "all", "trained_columns": 2},
    "blocks2": {"block_size": 2},
    "blocks10": {"block_size": 10},
    "full-cores": {"r": 6, "block_size": None, "trainable": "all"},
    "before": {"r": 24, "axis_block_size": None, "trainable": "all", "trained_columns": 2, **WIDE},
    "wide-bounds": {**WIDE, "axis_bound": None, "axis_block_size": "lean"},
    "gain6": {"core_gain": 6.0},
    "no-axis-bound": {"axis_bound": None},
    "lean": {"axis_block_size": "lean"},
    "mean": {"pooling": "mean"},
    "scaled": {"components": 0},
    "router-perturb": {"init_router": "perturb"},
    "router-kaiming": {"init_router": "kaiming"},
    "router-kmeans": {"init_router": "kmeans"},
    "router-kmeans-balanced": {"init_router": "kmeans_balanced"},
    "experts-kaiming": {"init_experts": "kaiming"},
    "experts-identity": {"init_experts": "identity"},
    "experts-hosvd": {"init_experts": "hosvd"},
    "experts-gradient": {"init_experts": "gradient"},
    "affinity-paper": {"affinity": "paper"},
    "affinity-cosine": {"affinity": "cosine"},
    "affinity-distance": {"affinity": "distance"},
    "slow-factors": {"trainable": "all", "factor_lr": 0.2},
    "fast-core": {"core_lr": 5.0},
    "slow-groups": {"core_lr": 0.25, "shared_lr": 1.0},
    "fast-router": {"router_lr": 5.0},
}
"""What each ablation changes in TuckA's default, or in the multipliers of the learning rate (`fitting.GROUPS`)."""


WIDEST = 128
"""Features of the narrowest layer in any task, which bounds ranks."""


class Method(NamedTuple):
    """A method of PEFT: its configuration, its size, what else depends on the size, and its learning rates."""

    config: type[PeftConfig]
    size: str
    sizes: Sequence[int]
    fields: Callable[[int], dict[str, Any]] = lambda size: {}
    learning_rates: tuple[float, ...] = (0.001, 0.002, 0.004, 0.008)


def _lora(**fields: Any) -> Method:
    return Method(LoraConfig, "r", range(1, WIDEST + 1), lambda r: {"lora_alpha": 2 * r, **fields})


METHODS: dict[str, Method] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "eva": _lora(init_lora_weights="eva"),
    # d and b train; wider projections would be slower than everything else here. 256 is PEFT's own size.
    "vera": Method(VeraConfig, "r", (256,), learning_rates=(0.004, 0.008, 0.016, 0.032)),
    # An odd number of reflections, or of MiSS rows, would not start at the base model.
    "hra": Method(HRAConfig, "r", range(2, WIDEST + 1, 2)),
    "oft": Method(OFTConfig, "oft_block_size", (2, 4, 8, 16, 32, 64, 128), lambda size: {"r": 0}),
    # Two layers of a kind share an A, and all share two Bs: the sharing that its documentation recommends.
    "lily": Method(LilyConfig, "r", range(1, WIDEST + 1), lambda r: {"stride_A": 2, "num_B": 2}),
    "miss": Method(MissConfig, "r", range(2, WIDEST + 1, 2)),
}
"""PEFT's methods by the name of their arm."""


class Arm(NamedTuple):
    """A method at a size.

    Attributes
    ----------
    name : str
        As on the command line.
    settings : callable
        From a task to what the row records: everything that makes the arm what it is on that task.
    build : callable
        (base, task, settings, calibration) to the model to train; `calibration` is a loader of training batches.
    learning_rates : tuple of float
        Those to choose from.
    calibrated : bool
        Whether building reads the calibration batches.
    sized : bool
        Whether the size follows TuckA's default.
    multipliers : dict of str to float
        Of the learning rate, for groups of parameters; see `fitting.GROUPS`.
    """

    name: str
    settings: Callable[[Task], dict[str, Any]]
    build: Callable[[nn.Module, Task, dict[str, Any], DataLoader], nn.Module]
    learning_rates: tuple[float, ...]
    calibrated: bool = False
    sized: bool = False
    multipliers: Mapping[str, float] = MappingProxyType({})


def arm_of(text: str) -> Arm:
    """The arm of a name, or of a name with settings of its own: "lora:r=6", "tucka:k=8,form=additive,factor_lr=0.3".

    Raises
    ------
    ValueError
        If there is no such arm, or a setting is not written name=value.
    """
    name, _, listed = text.partition(":")
    own = parse_settings(listed)
    if name.startswith("tucka"):
        ablation = name.removeprefix("tucka").removeprefix("-")
        if ablation in ("", "paper"):
            return _tucka(text, ablation == "paper", own)
        if ablation in ABLATIONS:
            return _tucka(text, False, {**ABLATIONS[ablation], **own})
    if name in ("frozen", "full") and not own:
        rates = {"frozen": (0.002, 0.004, 0.008, 0.016), "full": (0.00025, 0.0005, 0.001, 0.002)}[name]
        return Arm(text, lambda task: {}, partial(_select, everything=name == "full"), rates)
    ranked = re.fullmatch(r"lora(\d+)", name)
    method, own = ("lora", {"r": int(ranked[1]), **own}) if ranked else (name, own)
    if method in METHODS:
        return _peft(text, METHODS[method], own)
    raise ValueError(f"arms are {', '.join(ARM_NAMES)}, each but frozen and full with :name=value,…; got {text!r}")


def parse_settings(text: str) -> dict[str, Any]:
    """Read "name=value,name=value"; a value is a Python literal, or else the text itself."""
    settings = {}
    for part in re.split(r",(?=\s*\w+=)", text) if text else []:
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"settings are written name=value, separated by commas, got {part!r}")
        try:
            settings[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name.strip()] = value
    return settings


def tucka_size(task: Task) -> int:
    """Adapter parameters of TuckA's default on a task."""
    return adapter_parameters(get_peft_model(task.base(), TuckAConfig(**_selection(task))), task)


def _selection(task: Task) -> dict[str, Any]:
    return dict(target_modules=list(task.target_modules), modules_to_save=list(task.modules_to_save) or None)


def _select(base: nn.Module, task: Task, settings: dict, calibration: DataLoader, *, everything: bool) -> nn.Module:
    """Train the head alone, or everything; no adapter."""
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(everything or bool(set(name.split(".")) & set(task.modules_to_save)))
    return base


def _peft(name: str, method: Method, own: dict[str, Any]) -> Arm:
    def with_size(size: int) -> dict[str, Any]:
        return {method.size: size, **method.fields(size), **own}

    def settings(task: Task) -> dict[str, Any]:
        if method.size in own:
            return with_size(own[method.size])
        # How many parameters train does not depend on where EVA starts them.
        plain = {"init_lora_weights": True} if method.config is LoraConfig else {}

        def parameters(size: int) -> int:
            config = method.config(**{**with_size(size), **plain}, **_selection(task))
            return adapter_parameters(get_peft_model(task.base(), config), task)

        return with_size(smallest_size(method.sizes, parameters, tucka_size(task)))

    def build(base: nn.Module, task: Task, settings: dict[str, Any], calibration: DataLoader) -> nn.Module:
        model = get_peft_model(base, method.config(**settings, **_selection(task)))
        if settings.get("init_lora_weights") == "eva":
            start_eva(
                model,
                calibration,
                prepare_model_inputs_fn=_kept_positions,
                prepare_layer_inputs_fn=_inputs_there,
                show_progress_bar=False,
            )
        return model

    eva = method.fields(1).get("init_lora_weights") == "eva"
    return Arm(name, settings, build, method.learning_rates, eva, sized=method.size not in own)


def _tucka(name: str, paper: bool, own: dict[str, Any]) -> Arm:
    own, multipliers = _without_multipliers(own)

    def config(task: Task) -> TuckAConfig:
        return (TuckAConfig.paper if paper else TuckAConfig)(**own, **_selection(task))

    def settings(task: Task) -> dict[str, Any]:
        made, plain = config(task), TuckAConfig()
        inherited = {field.name for field in fields(PeftConfig)} | {"format_version", *_selection(task)}
        names = [field.name for field in fields(TuckAConfig) if field.name not in inherited]
        # What does nothing in a configuration is no setting of it.
        inert = {"core_gain": made.normalize != "bounded", "axis_bound": made.axis_block_size is None}
        names = [name for name in names if not inert.get(name)]
        neutral = {name: REFERENCE.get(name, getattr(plain, name)) for name in names}
        return {**{n: getattr(made, n) for n in names if getattr(made, n) != neutral[n]}, **multipliers}

    def build(base: nn.Module, task: Task, settings: dict[str, Any], calibration: DataLoader) -> nn.Module:
        made = config(task)
        return tucka.apply(base, made, calibration=calibration if starts_from_data(made) else None, progress=False)

    rates = (0.002, 0.004, 0.008, 0.016) if paper else (0.004, 0.008, 0.016, 0.032)
    return Arm(name, settings, build, rates, True, multipliers=multipliers)


def _without_multipliers(own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    return {k: v for k, v in own.items() if k not in GROUPS}, {k: v for k, v in own.items() if k in GROUPS}


def _kept_positions(batch: dict[str, Tensor], config: PeftConfig) -> Tensor | None:
    """Where a batch has no padding; EVA's own rule wants one label per token."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def _inputs_there(layer_input: Any, kept: Tensor | None, layer_name: str) -> Tensor:
    x = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return x.flatten(0, -2) if kept is None else x[kept]


ARM_NAMES = (
    "frozen", "full", "lora2", "lora4", "lora8", "lora16", *METHODS, "tucka", "tucka-paper",
    *(f"tucka-{name}" for name in ABLATIONS),
)  # fmt: skip
"""All arms; "lora" is the sized one."""
