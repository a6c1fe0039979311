"""Closed-form counts of the parameters that TuckA and the methods it is compared with train.

Every count follows what PEFT 0.21 stores for the method, so it equals the number of parameters that require a gradient
after `peft.get_peft_model`, without building the adapter. Heads trained in full (`modules_to_save`) and biases are not
adapter parameters and are not counted.

Legend: D and O are the input and output features of a layer; R, K, T and P are `r`, `k`, `t` and `p` of TuckA.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from tucka.plan import place_at_depth

if TYPE_CHECKING:
    from tucka import TuckAConfig


class LayerShape(NamedTuple):
    """Name and size of a linear layer that a method may adapt."""

    name: str
    in_features: int
    out_features: int


class ParameterCount(NamedTuple):
    """Trainable parameters of a method on a model.

    Attributes
    ----------
    method : str
        Key of `METHODS`.
    layers : dict of str to int
        Count of every layer, in the order of the model. Parameters that layers share are in the first of them.
    once : int
        Parameters the model holds once, whatever its depth: TuckA's router, 0 for every other method.
    """

    method: str
    layers: dict[str, int]
    once: int

    @property
    def total(self) -> int:
        """All trainable parameters of the method."""
        return sum(self.layers.values()) + self.once


def layer_shapes(model: nn.Module, target_modules: str | Iterable[str] | PeftConfig) -> list[LayerShape]:
    """Collect the layers of an unadapted model that PEFT would adapt, in the order of the model.

    Parameters
    ----------
    model : nn.Module
        The model before `get_peft_model`.
    target_modules : str, iterable of str, or PeftConfig
        A regular expression, "all-linear", names or endings of names, as in PEFT. A config brings its other selection
        fields along (`exclude_modules`, `layers_to_transform`, `modules_to_save`, …) and is not changed.

    Raises
    ------
    ValueError
        If nothing matches, if a match is neither `nn.Linear` nor `Conv1D`, or if the model is already adapted.
    """
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(f"layers are read before adaptation, but {len(adapted)} are adapted, first {adapted[0]!r}")
    config = _selection(target_modules, model)
    shapes: list[LayerShape] = []
    for name, module in model.named_modules():
        # The empty name is the model itself, which PEFT never replaces.
        if name and check_target_module_exists(config, name):
            if not isinstance(module, (nn.Linear, Conv1D)):
                raise ValueError(f"only Linear and Conv1D are counted, but {name!r} is a {type(module).__name__}")
            shapes.append(LayerShape(name, *_get_in_out_features(module)))
    if not shapes:
        raise ValueError(f"target_modules={config.target_modules!r} match no module of {type(model).__name__}")
    return shapes


def lora(shape: LayerShape, r: int) -> int:
    """Count A (R×D) and B (O×R) of LoRA [1]_.

    PEFT trains any rank, also one above the narrower side of a head or a gate, so no upper bound is imposed.

    References
    ----------
    .. [1] Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1.
    """
    _check_size(shape, "rank r", r)
    return r * (shape.in_features + shape.out_features)


def dora(shape: LayerShape, r: int) -> int:
    """Count LoRA's factors and the magnitude vector (O) of DoRA [1]_.

    PEFT keeps one magnitude per output feature, whichever way round the base layer stores its weight.

    References
    ----------
    .. [1] Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
    """
    return lora(shape, r) + shape.out_features


def vera(shape: LayerShape, r: int) -> int:
    """Count the scaling vectors d (R) and b (O) of VeRA [1]_; the random projections they scale are frozen.

    The frozen projections are meant to be wide, so r may exceed the layer's features.

    References
    ----------
    .. [1] Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.
    """
    _check_size(shape, "rank r", r)
    return r + shape.out_features


def hra(shape: LayerShape, r: int) -> int:
    """Count the vectors (D×R) of HRA's chain of r Householder reflections [1]_.

    PEFT accepts r > D; it is rejected here because D reflections already reach every orthogonal D×D matrix.

    References
    ----------
    .. [1] Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
       Adaptation", arXiv 2405.17484.
    """
    _check_size(shape, "rank r", r, in_features=shape.in_features)
    return r * shape.in_features


def oft(shape: LayerShape, r: int | None = None, block_size: int | None = None) -> int:
    """Count the skew-symmetric matrices behind OFT's block-diagonal rotation of the input [1]_.

    PEFT stores, for each of the D/b blocks, the b(b−1)/2 entries above the diagonal, which a Cayley transform turns
    into a rotation. `r` is the number of blocks, `block_size` is b, and one of the two is given. As in PEFT, a value
    that does not divide D gives way to the nearest that does, the smaller of two equally near; unlike in PEFT, one
    above D is rejected rather than lowered to D.

    References
    ----------
    .. [1] Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280.
    """
    width = shape.in_features
    if r is not None and block_size is None:
        _check_size(shape, "number of blocks r", r, in_features=width)
        used = width // _nearest_divisor(width, r)
    elif block_size is not None and r is None:
        _check_size(shape, "block_size", block_size, in_features=width)
        used = _nearest_divisor(width, block_size)
    else:
        raise ValueError(f"oft takes exactly one of r and block_size, got r={r} and block_size={block_size}")
    return (width // used) * (used * (used - 1) // 2)


def tucka(shape: LayerShape, config: TuckAConfig) -> int:
    """Count what one TuckA layer trains if it shares its factors with no other layer [1]_.

    References
    ----------
    .. [1] TuckA, arXiv 2511.06859, section 3; untied and shared factors, the additive form, the shared slice and
       core-only training go beyond the paper.
    """
    return tucka_factors(shape, config) + tucka_core(shape, config)


def tucka_factors(shape: LayerShape, config: TuckAConfig) -> int:
    """Count the trained factors: U (D×R), and untied a second of that size, or V (O×R) in the additive form."""
    if config.trainable == "core":
        return 0
    columns = config.trained(tucka_rank(shape, config))
    if config.form == "additive":
        return columns * (shape.in_features + shape.out_features)
    return columns * shape.in_features * (1 if config.tie_factors else 2)


def tucka_core(shape: LayerShape, config: TuckAConfig) -> int:
    """Count the core (K×P×R×H), the expert factor C (T×P) and the shared slices (R×H and A×D), trained in every mode.

    With a tensor lasso, also its weights: P, R, and unless the D-modes are tied another R.
    """
    r = tucka_rank(shape, config)
    slices = config.k * config.p + (1 if config.shared_expert else 0)
    on_axes = shape.in_features * (config.axis_width(shape.in_features, shape.out_features) or 0)
    return slices * r * config.block_width(r) + on_axes + config.t * config.p + _lasso(r, config.p, config)


def _lasso(r: int, p: int, config: TuckAConfig) -> int:
    tied = config.tie_factors and config.form == "multiplicative"
    return p + r * (1 if tied else 2) if config.lasso else 0


def tucka_router(shape: LayerShape, config: TuckAConfig) -> int:
    """Count the router's centroids (K·T of them); `shape` is the layer whose input they are compared with."""
    return config.k * config.t * config.placed_size(shape.in_features)


def tucka_rank(shape: LayerShape, config: TuckAConfig) -> int:
    """Return the layer's rank: the first match in `rank_pattern` by PEFT's rule, else `r`."""
    ranks = config.rank_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), shape.name), config.r)
    limits = {"in_features": shape.in_features}
    if config.form == "additive":
        limits["out_features"] = shape.out_features
    _check_size(shape, "rank r", r, **limits)
    return r


METHODS: dict[str, Callable[..., int]] = {
    "lora": lora,
    "dora": dora,
    "vera": vera,
    "hra": hra,
    "oft": oft,
    "tucka": tucka,
}


def count(shapes: Iterable[LayerShape], method: str, **hyper: Any) -> ParameterCount:
    """Count the trainable parameters of a method, per layer and for the whole model.

    Parameters
    ----------
    shapes : iterable of LayerShape
        The adapted layers, from `layer_shapes`. The first feeds TuckA's router, unless its config names another; one
        router is counted, while a model of separate towers has one for each.
    method : str
        Key of `METHODS`.
    **hyper
        What the method's function takes beside the shape: `r`; `r` or `block_size` for OFT; `config` for TuckA.

    Raises
    ------
    ValueError
        If the method is unknown, if it does not take `hyper`, if a size does not fit a layer, if the layers are none
        or share a name, or if the router's layer is not among them.

    Examples
    --------
    >>> count([LayerShape("query", 768, 768), LayerShape("value", 768, 768)], "lora", r=8).total
    24576
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, got {method!r}")
    formula = METHODS[method]
    _check_hyper(method, formula, hyper)
    shapes = list(shapes)
    layers = {shape.name: formula(shape, **hyper) for shape in shapes}
    if not shapes or len(layers) < len(shapes):
        raise ValueError(f"layers are at least one and have distinct names, got {len(shapes)} with {len(layers)} names")
    if method != "tucka":
        return ParameterCount(method, layers, once=0)
    config = hyper["config"]
    for shape in _layers_borrowing_factors(shapes, config):
        layers[shape.name] -= tucka_factors(shape, config)
    if config.router_depth:
        for shape in shapes:
            if shape.name in place_at_depth(config.router_depth, list(layers)).unrouted:
                r = tucka_rank(shape, config)
                layers[shape.name] -= tucka_core(shape, config) - (r * r + 1 + _lasso(r, 1, config))
    return ParameterCount(method, layers, once=tucka_router(_router_layer(shapes, config), config))


def _router_layer(shapes: Sequence[LayerShape], config: TuckAConfig) -> LayerShape:
    """Return the layer whose input feeds the router: the one named, the first of its block, or the first of all."""
    name = config.router_module
    if config.router_depth:
        name = place_at_depth(config.router_depth, [shape.name for shape in shapes]).owner
    if name is None:
        return shapes[0]
    named = [shape for shape in shapes if shape.name == name]
    matches = named or [shape for shape in shapes if shape.name.endswith(f".{name}")]
    if len(matches) != 1:
        raise ValueError(
            f"router_module={name!r} must match one adapted layer, but matches {len(matches)} of {len(shapes)}"
        )
    return matches[0]


def _layers_borrowing_factors(shapes: Sequence[LayerShape], config: TuckAConfig) -> list[LayerShape]:
    """Return the layers whose factors belong to an earlier layer of the same kind, width and rank."""
    if not config.share_factors:
        return []
    owners, borrowers = set(), []
    for shape in shapes:
        leaf = shape.name.rpartition(".")[2]
        kind = (leaf, shape.in_features, shape.out_features, tucka_rank(shape, config))
        if kind in owners:
            borrowers.append(shape)
        owners.add(kind)
    return borrowers


def _selection(target_modules: str | Iterable[str] | PeftConfig, model: nn.Module) -> Any:
    """Return a config of our own that PEFT's matching rule can read, with "all-linear" spelt out."""
    if isinstance(target_modules, PeftConfig):
        # Copied because spelling out "all-linear" writes into the config.
        config: Any = copy.copy(target_modules)
    else:
        names = target_modules if isinstance(target_modules, str) else sorted(target_modules)
        # Any method's config would do: how layers are selected is the same for all of them.
        config = LoraConfig(target_modules=names)
    if config.target_modules is None:
        raise ValueError(f"target_modules must name the layers to count, got None from {type(config).__name__}")
    return _maybe_include_all_linear_layers(config, model)


def _check_hyper(method: str, formula: Callable[..., int], hyper: dict[str, Any]) -> None:
    """Reject hyperparameters that the method does not take, and missing ones that it needs."""
    _, *parameters = inspect.signature(formula).parameters.values()
    accepted = [parameter.name for parameter in parameters]
    needed = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    if not needed <= hyper.keys() <= set(accepted):
        given = ", ".join(f"{name}={value!r}" for name, value in hyper.items()) or "nothing"
        raise ValueError(f"method {method!r} takes {' or '.join(accepted)}, got {given}")


def _check_size(shape: LayerShape, what: str, size: int, **limits: int) -> None:
    """Reject a rank or block size below 1 or above a dimension of the layer."""
    if size < 1:
        raise ValueError(f"{what}={size} of {shape.name!r} is below 1")
    for dimension, limit in limits.items():
        if size > limit:
            raise ValueError(f"{what}={size} exceeds {dimension}={limit} of {shape.name!r}")


def _nearest_divisor(number: int, near: int) -> int:
    """Return the divisor of `number` nearest to `near`, the smaller of two equally near."""
    divisors = (divisor for divisor in range(1, number + 1) if number % divisor == 0)
    return min(divisors, key=lambda divisor: (abs(divisor - near), divisor))
