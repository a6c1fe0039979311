"""State dicts: checking them before anything is copied, and reading those of the paper's published code.

An adapter is PEFT's two files; `tucka.weights` checks them before a model is touched. Keys end in
`tucka_experts.{core, expert_factor, input_factor, output_factor, held_input, held_output, shared_core, axis_core}` and
`tucka_router.{centroids, center, scale, axes, spread, initialised, balance_bias}`; a shared factor stands at the layer
that owns it and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    check_target_module_exists,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .weights import FILE_PREFIX, PUBLISHED_KEYS, is_own
from .weights import header_shapes as header_shapes

if TYPE_CHECKING:
    from .config import TuckAConfig


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
    unknown = [key for key in state_dict if is_own(key) and key not in expected]
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

    base = base_model(model)
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


def base_model(model: nn.Module) -> nn.Module:
    """The model that PEFT's wrappers hold."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model
