"""Files: checking them before a model is touched, and reading those of the paper's published code.

An adapter is PEFT's two files. Keys end in `tucka_experts.{core, expert_factor, input_factor, output_factor,
shared_core}` and `tucka_router.{centroids, center, scale, spread, initialised, balance_bias}`; a shared factor stands
at the layer that owns it and nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    check_target_module_exists,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

if TYPE_CHECKING:
    from .config import TuckAConfig

PUBLISHED_KEYS = {
    "tucka_g": "tucka_experts.core",
    "tucka_c": "tucka_experts.expert_factor",
    "tucka_u": "tucka_experts.input_factor",
    "tucka_ec": "tucka_router.centroids",
}
"""Ends of the published code's keys, and of ours."""

FILE_PREFIX = "base_model.model."


def check_weights_beside(directory: str, subfolder: str | None, config: TuckAConfig) -> None:
    """Check the local weights file beside a configuration against it, reading its header alone.

    Raises
    ------
    ValueError
        If there are weights but no whole safetensors file, or a shape that the configuration does not give.
    """
    folder = Path(directory) / (subfolder or "")
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.exists():
        if (folder / WEIGHTS_NAME).exists():
            raise ValueError(f"{folder / WEIGHTS_NAME} is a pickle; adapters are read from {path.name} only")
        return
    for key, shape in header_shapes(path).items():
        expected = _expected_shape(key, config)
        if config.router_depth and shape in ((1, 1), (1, 1, *shape[2:])):  # a layer before the router: one expert
            expected = None if expected is None else (1, 1, *expected[2:])
        if expected and (len(shape) != len(expected) or any(e not in (None, s) for e, s in zip(expected, shape))):
            shown = tuple("…" if size is None else size for size in expected)
            raise ValueError(
                f"{path}: {key} has shape {shape}, but k={config.k}, t={config.t}, p={config.p}, "
                f"r={_rank(key, config)} of its configuration give {shown}"
            )


def header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by key; `ValueError` if it is none or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _expected_shape(key: str, config: TuckAConfig) -> tuple[int | None, ...] | None:
    """The shape a configuration gives a key; None stands for sizes only the model knows."""
    for published, ours in PUBLISHED_KEYS.items():
        if key.endswith(f".{published}"):
            key = key.removesuffix(published) + ours
    rank = _rank(key, config)
    return {
        "core": (config.k, config.p, rank, rank),
        "expert_factor": (config.t, config.p),
        "input_factor": (None, rank),
        "output_factor": (None, rank),
        "shared_core": (rank, rank),
        "centroids": (config.k * config.t, None),
        "balance_bias": (config.k, config.t),
    }.get(key.rpartition(".")[2] if ".tucka_" in key else "")


def _rank(key: str, config: TuckAConfig) -> int:
    layer = key.removeprefix(FILE_PREFIX).partition(".tucka_")[0]
    pattern = config.rank_pattern or {}
    return pattern.get(get_pattern_key(list(pattern), layer), config.r)


def adapted_names_in(state_dict: dict[str, Tensor], prefix: str) -> set[str]:
    """Names of the layers that a state dict of an adapter adapts."""
    names = {key.rsplit(f".{prefix}", 1)[0] for key in state_dict if f".{prefix}" in key}
    return {name.removeprefix(FILE_PREFIX).removeprefix("_orig_mod.") for name in names}


def require_whole_adapter(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Check, before anything is copied, that a state dict holds every tensor of an adapter in its shape, and no other.

    Raises
    ------
    ValueError
        Naming the first key at fault and, for a shape, both shapes.
    """
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    expected = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
    missing = [key for key in expected if key not in state_dict]
    if missing:
        raise ValueError(f"the adapter file lacks {len(missing)} of {len(expected)} tensors, {missing[0]} among them")
    unknown = [key for key in state_dict if ".tucka_" in key and key not in expected]
    if unknown:
        raise ValueError(f"the adapter file holds {len(unknown)} tensors the model has no place for, as {unknown[0]}")
    for key, value in expected.items():
        if value.shape != state_dict[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(state_dict[key].shape)} in the adapter file, {tuple(value.shape)} in the model"
            )


# --- adapters of the paper's published code ----------------------------------------------------------------------


def published_name(model: nn.Module, layer_name: str) -> str:
    """The name a layer had when transformers first wrote checkpoints of its model, by transformers' own conversions."""
    if not isinstance(model, PreTrainedModel):
        return layer_name
    key = f"{layer_name}.weight"
    renamed = revert_weight_conversion(model, {key: torch.empty(0)})
    return next(iter(renamed), key).removesuffix(".weight") if len(renamed) == 1 else layer_name


def modernise_targets(config: TuckAConfig, model: nn.Module) -> None:
    """Point the targets of a published adapter at today's names of the same layers."""
    if config.target_modules in (None, "all-linear"):
        return
    candidates = [name for name, module in model.named_modules() if name and not list(module.children())]
    published = {name: published_name(model, name) for name in candidates}
    if all(name == old for name, old in published.items()):
        return
    config.target_modules = {
        name for name, old in published.items() if check_target_module_exists(config, old)
    } or config.target_modules  # type: ignore[assignment]


def read_published_weights(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of an adapter that the published code saved; any other state dict is returned as it is."""
    if not any(key.rpartition(".")[2] in PUBLISHED_KEYS for key in state_dict):
        return state_dict
    from .model import layers_of

    base = _base_model(model)
    layers = {published_name(base, layer.name): layer for layer in layers_of(model)}
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        old_name, _, end = key.removeprefix(FILE_PREFIX).rpartition(".")
        layer: Any = layers.get(old_name)
        if end not in PUBLISHED_KEYS or layer is None:
            renamed[key] = value
            continue
        if end == "tucka_ec":  # stored where the published router ran; ours may be held by a layer beside it
            layer = layer.dispatcher.router_owners[adapter_name]
            renamed[f"{FILE_PREFIX}{layer.name}.tucka_router.initialised"] = torch.tensor(True)
        renamed[f"{FILE_PREFIX}{layer.name}.{PUBLISHED_KEYS[end]}"] = value
    return renamed


def _base_model(model: nn.Module) -> nn.Module:
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model
