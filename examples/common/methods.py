"""The methods that the examples compare: TuckA in several settings, PEFT's methods, the head alone, and everything.

A method is named as "lora", or with fields of its own as "lora:r=16,lora_alpha=16". What is not said is chosen: PEFT's
methods get the smallest size at which they train at least as many parameters as TuckA's configuration.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig
from torch import nn

import tucka
from analysis import LayerShape, count, layer_shapes
from tucka import TuckAConfig
from tucka.starts import starts_from_data


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Attributes
    ----------
    summary : str
        One line on it.
    learning_rate : float
        Where an example gives none for it.
    config : callable, optional
        From fields to PEFT's configuration; None if there is no adapter.
    fields : dict
        Of that configuration, unless others are given.
    size : str, optional
        The field that follows TuckA's size; None if the method's size is its own.
    sizes : callable
        Candidates of it, growing.
    follows : callable
        The fields that follow from a size.
    counted : str, optional
        The method's name in `analysis.count`.
    """

    summary: str
    learning_rate: float
    config: Callable[..., PeftConfig] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    size: str | None = None
    sizes: Callable[[], Iterable[int]] = lambda: itertools.count(1)
    follows: Callable[[int], Mapping[str, Any]] = lambda size: {}
    counted: str | None = None

    @property
    def is_tucka(self) -> bool:
        """Whether the sizes of TuckA are this method's."""
        return self.counted == "tucka"

    @property
    def helps(self) -> dict[str, str]:
        """TuckA's fields, and what each is."""
        known = TuckAConfig.__dataclass_fields__.items()
        return {name: entry.metadata["help"] for name, entry in known if "help" in entry.metadata}


def _tucka(
    summary: str, learning_rate: float, config: Callable[..., PeftConfig] = TuckAConfig, **fields: Any
) -> Method:
    return Method(summary, learning_rate, config, fields, counted="tucka")


def _lora(summary: str, counted: str = "lora", **fields: Any) -> Method:
    alpha = lambda r: {"lora_alpha": 2 * r}  # noqa: E731
    return Method(summary, 4e-3, LoraConfig, fields, size="r", follows=alpha, counted=counted)


METHODS: dict[str, Method] = {
    "frozen": Method("the head alone", 8e-3),
    "full": Method("every parameter of the model", 3e-4),
    "tucka": _tucka("Tucker experts, the library's defaults", 1.6e-2),
    "tucka-paper": _tucka("Tucker experts, the paper's settings", 6e-3, TuckAConfig.paper),
    "tucka-core": _tucka("Tucker experts between random factors, which are held", 8e-3, trainable="core"),
    "lora": _lora("low-rank updates"),
    "rslora": _lora("LoRA, scaled by the root of its rank", use_rslora=True),
    "dora": _lora("LoRA with magnitudes of its own", counted="dora", use_dora=True),
    # What trains hardly depends on the rank of the projections; 256 is PEFT's own.
    "vera": Method("vectors between random projections", 1.6e-2, VeraConfig, {"r": 256}, counted="vera"),
    # An odd number of reflections would not start at the base model.
    "hra": Method(
        "reflections of the input", 2e-3, HRAConfig, size="r", sizes=lambda: itertools.count(2, 2), counted="hra"
    ),
    "oft": Method(
        "rotations of the input, in blocks",
        2e-3,
        OFTConfig,
        {"r": 0},
        size="oft_block_size",
        sizes=lambda: (2**n for n in itertools.count(1)),
        counted="oft",
    ),
    "boft": Method("rotations of the input, in blocks of one butterfly", 2e-3, BOFTConfig, {"boft_block_size": 4}),
}
"""All methods by name."""

RECORDED = (
    "r", "k", "t", "p", "alpha", "routing", "affinity", "pooling", "normalize", "form", "share_factors",
    "shared_expert", "trainable", "init_router", "init_experts", "block_size", "trained_columns",
    "axis_block_size", "core_gain", "axis_bound",
)  # fmt: skip
"""Fields of TuckA that a row says in any case, so that it keeps its meaning when a default changes."""

ARGUMENT = {"oft_block_size": "block_size"}
"""Where `analysis.count` has another name for a size."""


def method_of(text: str) -> tuple[Method, dict[str, Any]]:
    """The method of a name, and the fields that the text sets.

    Raises
    ------
    ValueError
        If there is no such method, a field is not written name=value, or the method has no fields.

    Examples
    --------
    >>> method_of("lora:r=16,use_rslora=True")[1]
    {'r': 16, 'use_rslora': True}
    """
    name, _, listed = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"methods are {', '.join(METHODS)}, got {name!r}")
    own = {}
    for part in re.split(r",(?=\s*\w+=)", listed) if listed else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"fields are written name=value, separated by commas, got {part!r}")
        own[key.strip()] = _literal(value)
    if own and METHODS[name].config is None:
        raise ValueError(f"{name} has no fields, got {', '.join(own)}")
    return METHODS[name], own


def settings_of(
    shapes: Sequence[LayerShape],
    method: str,
    fields: Mapping[str, Any] | None = None,
    tucka_fields: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Resolve the fields of a method on some layers: what a row of results records.

    Parameters
    ----------
    shapes : sequence of LayerShape
        The layers to adapt, see `analysis.layer_shapes`.
    method : str
        Its name, with or without fields.
    fields : dict, optional
        Fields for this method; those in its name come first.
    tucka_fields : dict, optional
        Of the TuckA configuration that sizes follow.
    """
    found, own = method_of(method)
    settings = {**found.fields, **(fields or {}), **own}
    if found.is_tucka:
        config = found.config(**settings)
        return {**{name: getattr(config, name) for name in RECORDED}, **settings}
    if found.size is None or found.size in settings:
        return {**(found.follows(settings[found.size]) if found.size else {}), **settings}
    reference = count(shapes, "tucka", config=TuckAConfig(**(tucka_fields or {}))).total
    size = _smallest(shapes, found, reference)
    return {found.size: size, **found.follows(size), **settings}


def adapted(
    base: nn.Module,
    method: str,
    *,
    targets: Sequence[str],
    heads: Sequence[str] = (),
    task_type: str | None = None,
    calibration: Iterable[Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    tucka_fields: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Adapt a pretrained model, in place.

    Parameters
    ----------
    base : Module
        The model.
    method : str
        Key of `METHODS`, with or without fields.
    targets, heads : sequence of str
        Layers to adapt, and layers that every method trains whole.
    task_type : str, optional
        PEFT's.
    calibration : iterable, optional
        Batches for the methods that start from data.
    fields, tucka_fields : dict, optional
        See `settings_of`.
    """
    found, _ = method_of(method)
    if found.config is None:
        return _selected(base, heads, everything=method == "full")

    def selection() -> dict[str, Any]:
        """Made anew for each configuration, as PEFT adds to the list of heads that it is given."""
        return dict(target_modules=list(targets), modules_to_save=list(heads) or None, task_type=task_type)

    shapes = layer_shapes(base, LoraConfig(**selection()))
    config = found.config(**settings_of(shapes, method, fields, tucka_fields), **selection())
    if found.is_tucka:
        return tucka.apply(base, config, calibration=calibration if starts_from_data(config) else None, progress=False)
    return peft.get_peft_model(base, config)


def adapter_parameters(model: nn.Module, heads: Sequence[str] = ()) -> int:
    """Count what trains beside the heads."""
    whole = {"modules_to_save", *heads}
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and whole.isdisjoint(name.split(".")))


def trainable_parameters(model: nn.Module) -> int:
    """Count everything that trains."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def is_routed(model: nn.Module) -> bool:
    """Whether a model carries Tucker experts."""
    return isinstance(model, peft.PeftModel) and isinstance(model.active_peft_config, TuckAConfig)


def _smallest(shapes: Sequence[LayerShape], method: Method, at_least: int) -> int:
    """The first size that trains at least so many parameters, or the largest that the layers allow."""
    narrowest, last = min(shape.in_features for shape in shapes), None
    for size in method.sizes():
        if method.counted in ("hra", "oft") and size > narrowest:
            break
        last = size
        if count(shapes, method.counted, **{ARGUMENT.get(method.size, method.size): size}).total >= at_least:
            break
    if last is None:
        raise ValueError(f"no size of {method.summary} fits layers of {narrowest} features")
    return last


def _selected(base: nn.Module, heads: Sequence[str], everything: bool) -> nn.Module:
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(everything or not set(heads).isdisjoint(name.split(".")))
    return base


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
