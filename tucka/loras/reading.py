"""LoRA adapters in PEFT's files, read and checked against the model they belong to; nothing is unpickled.

Shape legend: D input features, O output features of a layer, r rank of a LoRA (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from ..layer import linear_features
from ..state import FILE_PREFIX, header_shapes, published_name

Sources = Union[Mapping[str, Union[str, Path]], Sequence[Union[str, Path]]]

UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "trainable_token_indices",
    "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Options of PEFT's LoRA with which an update is more, or other, than s·B·A for the weight of a linear layer."""

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base model's weights alone."""


class Update(NamedTuple):
    """What a LoRA adds to a layer: W + s B A."""

    down: Tensor  # A, (r, D)
    up: Tensor  # B, (O, r)
    scale: float  # s

    @classmethod
    def zero(cls, d: int, o: int) -> Update:
        """No update: of rank 0."""
        return cls(torch.zeros(0, d), torch.zeros(o, 0), 0.0)

    def norm(self) -> float:
        """‖s B A‖, from r×r matrices, in float64."""
        down, up = self.down.double(), self.up.double()
        return abs(self.scale) * float(((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0).sqrt())


class LoraFile(NamedTuple):
    """One LoRA, as far as experts can carry it."""

    name: str
    config: LoraConfig
    updates: dict[str, Update]  # by layer name
    heads: dict[str, dict[str, Tensor]]  # modules saved whole (`modules_to_save`), by module name


def read_loras(model: nn.Module, sources: Sources, check_base: bool = True) -> list[LoraFile]:
    """Read LoRAs and check that they are plain, of one base, and of this model; the model is only looked at.

    Parameters
    ----------
    model : Module
        The base model.
    sources : dict of {name: directory}, or sequence of directories
        Local directories, or ids on the Hub.
    check_base : bool
        Refuse LoRAs whose files name different base models.

    Raises
    ------
    ValueError
        If there is none; if one is no LoRA, is stored as a pickle or damaged, uses what experts cannot carry, or names
        another base model than the first; if a layer or a shape does not fit the model.
    """
    named = named_sources(sources)
    configs = {name: _read_config(name, source) for name, source in named.items()}
    if check_base:
        _require_one_base(configs)
    return [_read(model, name, source, configs[name]) for name, source in named.items()]


def named_sources(sources: Sources) -> dict[str, str]:
    """{name: directory}; without names, the last parts of the directories, or where those agree all of them."""
    if isinstance(sources, (str, Path)):
        raise ValueError(f"loras={str(sources)!r} is one adapter; give a list of directories, or {{name: directory}}")
    if not isinstance(sources, Mapping):
        ends = [Path(source).name for source in sources]
        names = ends if len(set(ends)) == len(ends) else [str(source) for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"an adapter is given twice in {names}; name them: {{name: directory}}")
        sources = dict(zip(names, sources))
    if not sources:
        raise ValueError("loras is empty; give the directories of at least one LoRA adapter")
    return {name: str(source) for name, source in sources.items()}


# --- configurations --------------------------------------------------------------------------------------------------


def _read_config(name: str, source: str) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(source)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"adapter {name!r}: {source} holds no configuration that PEFT reads: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapter {name!r} is of type {config.peft_type}; experts are made of LORA adapters")
    used = [option for option in UNSUPPORTED if getattr(config, option, None)]
    if used:
        raise ValueError(f"adapter {name!r} sets {used[0]}={getattr(config, used[0])!r}, which experts cannot carry")
    if config.bias != "none":
        raise ValueError(f"adapter {name!r} trains biases (bias={config.bias!r}), which experts cannot carry")
    if config.init_lora_weights not in PLAIN_STARTS:
        raise ValueError(
            f"adapter {name!r} started with init_lora_weights={config.init_lora_weights!r}, which changes the base "
            "model; convert it to a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def _require_one_base(configs: dict[str, LoraConfig]) -> None:
    bases = {name: str(c.base_model_name_or_path) for name, c in configs.items() if c.base_model_name_or_path}
    first = next(iter(bases), None)
    for name, base in bases.items():
        if first is not None and base != bases[first]:
            raise ValueError(
                f"adapters {first!r} and {name!r} have different base models, {bases[first]!r} and {base!r}; "
                "if these are one model under two names, pass check_base=False"
            )


# --- weights ---------------------------------------------------------------------------------------------------------


def _read(model: nn.Module, name: str, source: str, config: LoraConfig) -> LoraFile:
    path = _weights_path(name, source)
    header_shapes(path)  # refuses a damaged file, naming it
    tensors = {key.removeprefix(FILE_PREFIX): value for key, value in load_file(path).items()}
    downs, ups = ({k.partition(f".{part}.")[0]: v for k, v in tensors.items() if f".{part}." in k}
                  for part in ("lora_A", "lora_B"))  # fmt: skip
    embedded = [key for key in tensors if ".lora_embedding_" in key]
    if embedded:
        raise ValueError(f"adapter {name!r} adapts an embedding ({embedded[0]}), which experts cannot carry")
    if downs.keys() != ups.keys() or not downs:
        alone = min(downs.keys() ^ ups.keys(), default="its file")
        raise ValueError(f"adapter {name!r}: {alone} holds no pair of lora_A and lora_B")
    others = {key: value for key, value in tensors.items() if ".lora_" not in key}
    layers = _layers_of(model, list(downs), name)
    updates = {
        layers[key]: _checked(model, Update(down, ups[key], _scale(config, key, down)), layers[key], name)
        for key, down in downs.items()
    }
    return LoraFile(name, config, updates, _heads(model, name, config, others))


def _weights_path(name: str, source: str) -> Path:
    if not Path(source).is_dir():
        return Path(hf_hub_download(source, SAFETENSORS_WEIGHTS_NAME))
    path = Path(source) / SAFETENSORS_WEIGHTS_NAME
    if not path.exists() and (path.parent / WEIGHTS_NAME).exists():
        raise ValueError(f"adapter {name!r}: {path.parent / WEIGHTS_NAME} is a pickle; only {path.name} is read")
    if not path.exists():
        raise ValueError(f"adapter {name!r}: {source} holds no {path.name}")
    return path


def _layers_of(model: nn.Module, keys: list[str], name: str) -> dict[str, str]:
    """The layers that keys of a file mean, also where transformers has renamed them since."""
    modules = {layer: module for layer, module in model.named_modules() if layer}
    renamed: dict[str, str] = {}
    if any(key not in modules for key in keys):
        renamed = {published_name(model, layer): layer for layer, module in modules.items() if linear_features(module)}
    found = {key: key if key in modules else renamed.get(key, "") for key in keys}
    lost = [key for key, layer in found.items() if not layer]
    if lost:
        raise ValueError(f"adapter {name!r} adapts {len(lost)} layers that the model does not have, as {lost[0]!r}")
    return found


def _scale(config: LoraConfig, key: str, down: Tensor) -> float:
    """α/r, or α/√r, with the rank and α that PEFT would give the layer."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), key), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), key), config.lora_alpha)
    if down.ndim == 2 and down.shape[0] != rank:
        raise ValueError(f"{key!r} has rank {down.shape[0]} in the file of its adapter, {rank} in its configuration")
    return alpha / rank**0.5 if config.use_rslora else alpha / rank


def _checked(model: nn.Module, update: Update, layer: str, name: str) -> Update:
    module = model.get_submodule(layer)
    features = linear_features(module)
    if features is None:
        raise ValueError(f"adapter {name!r} adapts {layer!r}, a {type(module).__name__}, which experts cannot")
    rank = update.down.shape[0]
    found, expected = (tuple(update.down.shape), tuple(update.up.shape)), ((rank, features[0]), (features[1], rank))
    if found != expected:
        raise ValueError(f"adapter {name!r}: A and B of {layer!r} have shapes {found}, the layer asks for {expected}")
    if not bool(update.down.isfinite().all() and update.up.isfinite().all()):
        raise ValueError(f"adapter {name!r} holds values that are not finite in {layer!r}")
    return update


# --- what is saved whole ---------------------------------------------------------------------------------------------


def _heads(
    model: nn.Module, name: str, config: LoraConfig, others: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:  # by module, by the tensor's name in it
    """The modules a LoRA saves whole; any other tensor must be the base model's own."""
    ends = tuple(config.modules_to_save or ())
    heads: dict[str, dict[str, Tensor]] = {}
    for module_name, module in model.named_modules():
        inside = any(module_name.startswith(f"{head}.") for head in heads)
        if not ends or not module_name.endswith(ends) or inside:  # PEFT's rule
            continue
        held: dict[str, Any] = module.state_dict()
        found = {key: others.pop(f"{module_name}.{key}") for key in held if f"{module_name}.{key}" in others}
        if not found:
            continue
        wrong = [key for key, value in held.items() if key not in found or found[key].shape != value.shape]
        if wrong:
            shape = tuple(found[wrong[0]].shape) if wrong[0] in found else "no"
            raise ValueError(
                f"adapter {name!r} holds {module_name}.{wrong[0]} with shape {shape}, the model with "
                f"{tuple(held[wrong[0]].shape)}"
            )
        heads[module_name] = found
    base = model.state_dict()
    for key, value in others.items():
        if key not in base or base[key].shape != value.shape or not torch.equal(base[key].to(value), value):
            raise ValueError(f"adapter {name!r} changes {key!r} of the base model, which experts cannot carry")
    return heads


def choose_heads(files: list[LoraFile], head_of: str | None) -> dict[str, dict[str, Tensor]]:
    """The modules to save: those of the adapter asked for, or those that all adapters hold alike.

    Raises
    ------
    ValueError
        If `head_of` names no adapter, or the adapters hold different ones and none is asked for.
    """
    if head_of is not None:
        chosen = [file for file in files if file.name == head_of]
        if not chosen:
            raise ValueError(f"head_of={head_of!r} is not one of the adapters {[file.name for file in files]}")
        return chosen[0].heads
    first = files[0]
    for file in files[1:]:
        for module in sorted({*first.heads, *file.heads}):
            if not _same(first.heads.get(module), file.heads.get(module)):
                raise ValueError(
                    f"adapters {first.name!r} and {file.name!r} hold different weights of {module!r}, of which a model "
                    "has one; choose an adapter's with head_of=…"
                )
    return first.heads


def _same(one: dict[str, Tensor] | None, other: dict[str, Tensor] | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(torch.equal(value, other[key]) for key, value in one.items())
