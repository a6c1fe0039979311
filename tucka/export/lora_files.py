"""An ordinary PEFT LoRA directory from the low-rank updates of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..config import TuckAConfig
from ..model import layers_of
from ..ranks.families import pattern_for
from ..weights import FILE_PREFIX, is_own
from .factors import LowRank
from .targets import base_module_names, exact_targets

BIASES = {"none": "none", "all": "all", "tucka_only": "lora_only"}


def lora_config(model: PeftModel, name: str, updates: Mapping[str, LowRank]) -> LoraConfig:
    """The configuration of a LoRA on the very layers of an adapter, with a scale of 1."""
    config: Any = model.peft_config[name]
    ranks = {layer: len(update.a) for layer, update in updates.items()}
    rank = max(ranks.values())
    pattern = {pattern_for(layer): r for layer, r in ranks.items() if r != rank}
    adapted = [layer for layer in layers_of(model) if layer.name in updates]
    return LoraConfig(
        r=rank,
        lora_alpha=rank,  # PEFT scales by lora_alpha / r
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=0.0,
        target_modules=exact_targets(updates, base_module_names(model)),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in adapted),
        bias=BIASES[config.bias],  # type: ignore[arg-type]
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=base_name(model, config),
        revision=config.revision,
        inference_mode=True,
    )


def base_name(model: PeftModel, config: TuckAConfig) -> Optional[str]:
    """The base model's name as `PeftModel.save_pretrained` finds it."""
    return config.base_model_name_or_path or vars(model.get_base_model()).get("name_or_path") or None


def beside_experts(model: PeftModel, name: str, save_embedding_layers: bool | str = "auto") -> dict[str, Tensor]:
    """What an adapter saves beside its experts: trained heads and biases, and embeddings of another size."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=save_embedding_layers)  # type: ignore[arg-type]
    return {key: value for key, value in state.items() if not is_own(key)}


def write_lora(
    folder: Path, model: PeftModel, config: LoraConfig, updates: Mapping[str, LowRank], beside: Mapping[str, Tensor]
) -> None:
    """Write the two files of a LoRA adapter."""
    tensors = dict(beside)
    for layer, update in updates.items():
        tensors[f"{FILE_PREFIX}{layer}.lora_A.weight"] = update.a
        tensors[f"{FILE_PREFIX}{layer}.lora_B.weight"] = update.b
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory, as tied embeddings do.
    held = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    save_file(held, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder), auto_mapping_dict=auto_mapping(model, config.task_type))


def auto_mapping(model: PeftModel, task_type: Any) -> Optional[dict[str, str]]:
    """The base model's class, by which PEFT builds it where no task says which."""
    if task_type is not None:
        return None
    kind = type(model.get_base_model())
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}
