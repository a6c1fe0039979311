"""What a configuration may say, as far as no model is needed to judge it."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from .fields import check_fields
from .patterns import check_expressions

if TYPE_CHECKING:
    from .config import TuckAConfig

CHOICES = {
    "routing": ("sample", "batch"),
    "affinity": ("paper", "cosine", "distance"),
    "pooling": ("mean", "mean_std"),
    "form": ("multiplicative", "additive"),
    "trainable": ("all", "core"),
    "init_router": ("perturb", "kaiming", "kmeans", "kmeans_balanced"),
    "init_experts": ("identity", "kaiming", "hosvd", "gradient"),
    "normalize": (False, True, "bounded"),
    "bias": ("none", "all", "tucka_only"),
}
"""Every option with a closed list of values, and the list."""

AXIS_WIDTHS = ("auto", "lean")
"""Values of `axis_block_size` by which a layer's width says that of its blocks."""

FLAGS = (
    "tie_factors", "share_factors", "share_inputs", "shared_expert", "pool_padding", "pool_answers", "balance_bias",
    "sync_route", "init_weights", "expert_shares",
)  # fmt: skip
"""Every option that is either True or False."""

NUMBERS = ("alpha", "perturb_scale", "balance_rate", "temperature", "warm_start", "lasso", "core_gain")
"""Fields that are numbers, whole or not."""

LONG = 2**63 - 1
"""The largest whole number of torch's."""


def validate(config: TuckAConfig) -> None:
    """Raise `ValueError` for what can be rejected without a model."""
    check_fields(config)
    for name in ("r", "k", "t", "p"):
        _check_count(name, getattr(config, name))
    for name, values in CHOICES.items():
        if not any(getattr(config, name) is value or _same_text(getattr(config, name), value) for value in values):
            raise ValueError(f"{name}={getattr(config, name)!r} is not one of {', '.join(map(repr, values))}")
    numbers = NUMBERS if config.axis_bound is None else (*NUMBERS, "axis_bound")
    for name in numbers:
        value = getattr(config, name)
        # Compared, not converted: a whole number may be too large for a float.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name}={value!r} is not a finite number")
    if config.temperature <= 0:
        raise ValueError(f"temperature={config.temperature} divides the logits: it must be above 0")
    for name in ("core_gain", "axis_bound"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} scales what experts act as: it must be above 0")
    if config.lasso < 0:
        raise ValueError(f"lasso={config.lasso} is a penalty: it must not be below 0")
    for name in FLAGS:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}={getattr(config, name)!r} is neither True nor False")
    if config.block_size is not None:
        _check_count("block_size", config.block_size)
    if config.trained_columns is not None:
        _check_count("trained_columns", config.trained_columns)
    by_layer = any(_same_text(config.axis_block_size, width) for width in AXIS_WIDTHS)
    if config.axis_block_size is not None and not by_layer:
        _check_count("axis_block_size", config.axis_block_size, other="one of 'auto', 'lean'")
    config.require_blocks(config.r, f"r={config.r}")
    for pattern, rank in (config.rank_pattern or {}).items():
        _check_count(f"rank_pattern[{pattern!r}]", rank)
        config.require_blocks(rank, f"rank_pattern[{pattern!r}]={rank}")
    _check_count("router_depth", config.router_depth, least=0)
    _check_count("components", config.components, least=0)
    if config.router_depth and config.router_module is not None:
        raise ValueError("router_depth and router_module both say which layer feeds the router; set one of them")
    if config.share_inputs and config.form != "multiplicative":
        raise ValueError(
            f"share_inputs=True shares an adapted input, which form={config.form!r} has not: use form='multiplicative'"
        )
    if config.sync_route and config.routing != "batch":
        raise ValueError(f"sync_route=True routes the global batch as one, but routing={config.routing!r}")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise ValueError("layers_to_transform selects among listed target_modules, but target_modules is a string")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern is set but layers_to_transform is not: it says which layers of the pattern")
    check_expressions(config)
    if config.trained_columns is not None and config.trainable == "core":
        warnings.warn(
            f"trained_columns={config.trained_columns} has no effect with trainable='core', which holds all columns: "
            "set trainable='all'",
            stacklevel=3,
        )
    if config.affinity == "paper" and config.t == 1 and config.init_router.startswith("kmeans"):
        warnings.warn(
            "with t=1 the paper's affinity is a sign, and centroids of k-means then choose by it alone. "
            "Use affinity='cosine' or 'distance'.",
            stacklevel=3,
        )
    if config.normalize is True and config.init_experts != "kaiming" and config.init_weights and not config.warm_start:
        warnings.warn(
            "normalize=True divides a zero core by its norm: the first step jumps from the identity to an update of "
            "full size. Use init_experts='kaiming' or warm_start with normalize=True.",
            stacklevel=3,
        )


def _same_text(given: Any, value: Any) -> bool:
    """Equality of texts alone: 1 is no True."""
    return isinstance(given, str) and given == value


def _check_count(name: str, value: Any, least: int = 1, other: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        rule = f"a whole number of at least {least}"
        raise ValueError(f"{name}={value!r} is not {other} or {rule}" if other else f"{name}={value!r} is not {rule}")
