"""Writing adapters in the checkpoint format of the paper's published code; `tucka.state` reads it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..config import PAPER, TuckAConfig
from ..model import dispatchers_of, layers_of, single_adapter_name
from ..state import FILE_PREFIX, PUBLISHED_KEYS, published_name
from .directory import write_export
from .lora_files import auto_mapping, base_name, beside_experts
from .targets import base_module_names, exact_targets

IMPLIED: dict[str, Any] = {
    # How experts and the router started leaves no trace, and the paper's affinity reads no principal components.
    **{field: value for field, value in PAPER.items() if not field.startswith("init_") and field != "components"},
    "pool_padding": True,
    "balance_bias": False,
    "router_depth": 0,
    "lasso": 0.0,
    "sync_route": False,
    "expert_shares": False,
}
"""What the published code always does, by our fields; how parameters were started does not matter any more."""

MAY_BE_LOST = ("pool_padding", "routing", "sync_route", "trainable")
"""Fields without which the tensors still say what they said: for batches without padding, or of one sample, or in one
process, or until it is trained on."""

OUR_KEYS = {ours: published for published, ours in PUBLISHED_KEYS.items()}


def to_published(
    model: PeftModel,
    directory: str | Path,
    *,
    adapter_name: str | None = None,
    ignore: Collection[str] = (),
) -> Path:
    """Write an adapter as the paper's published code does, so that it, and this library, load it.

    Parameters
    ----------
    model : PeftModel
        The adapted model.
    directory : str or Path
        Where to write; an earlier export there is replaced.
    adapter_name : str, optional
        Default: the active adapter.
    ignore : collection of str
        Fields whose value may be lost: "pool_padding" where no batch is padded, "routing" where batches hold one
        sample, "sync_route" and "trainable".

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    TypeError
        If `model` is no `PeftModel`.
    ValueError
        If a setting differs from what the published code always does (the message names the field and both values),
        layers differ in rank, there are several routers, or the router has not started.

    Notes
    -----
    Layers are named as in the checkpoints that transformers wrote first (see `tucka.state.published_name`). The
    published code has no flag that says a router was trained: by its known fault it starts the centroids of a loaded
    adapter anew from the next batch. This library does not.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"to_published takes a PeftModel, but got a {type(model).__name__}")
    name = single_adapter_name(model, adapter_name)
    config: Any = model.peft_config[name]
    _check_expressible(model, name, config, frozenset(ignore))
    tensors, fields = _tensors(model, name), _fields(model, name, config)

    def write(folder: Path) -> None:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True))

    return write_export(directory, {"kind": "published", "adapter": name}, write)


def _check_expressible(model: PeftModel, name: str, config: TuckAConfig, ignore: frozenset[str]) -> None:
    unknown = sorted(ignore - set(MAY_BE_LOST))
    if unknown:
        raise ValueError(f"ignore names {unknown[0]!r}, but the fields that may be lost are {', '.join(MAY_BE_LOST)}")
    for field, published in IMPLIED.items():
        value = getattr(config, field)
        if value != published and field not in ignore:
            raise ValueError(
                f"the published format cannot express {field}={value!r}: its code always has {field}={published!r}"
            )
    for layer in layers_of(model):
        held: Any = layer.tucka_experts
        if name in held and held[name].rank[-1] != config.r:
            raise ValueError(
                f"the published format has one rank, r={config.r}, but layer {layer.name!r} has rank "
                f"{held[name].rank[-1]}"
            )
    routers = dispatchers_of(model, name)
    if len(routers) != 1:
        raise ValueError(f"the published format holds one router, but the model has {len(routers)}: {list(routers)}")
    if not all(bool(dispatcher.router(name).initialised) for dispatcher in routers.values()):
        raise ValueError("the router has not started, and the published format cannot say so")


def _tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """The adapter's tensors under the published keys."""
    base = model.get_base_model()
    found = dict(beside_experts(model, name))
    for layer in layers_of(model):
        held = {"tucka_experts": layer.tucka_experts, "tucka_router": layer.tucka_router}
        for ours, published in OUR_KEYS.items():
            kind, _, parameter = ours.partition(".")
            if name in held[kind]:
                key = f"{FILE_PREFIX}{published_name(base, layer.name)}.{published}"
                found[key] = held[kind][name].state_dict()[parameter]
    return {key: value.detach().cpu().clone().contiguous() for key, value in found.items()}


def _fields(model: PeftModel, name: str, config: TuckAConfig) -> dict[str, Any]:
    """The published configuration file."""
    base = model.get_base_model()
    layers = [layer.name for layer in layers_of(model) if name in layer.tucka_experts]
    published = {module: published_name(base, module) for module in base_module_names(model)}
    return {
        "peft_type": "TUCKA",
        "task_type": config.task_type,
        "auto_mapping": auto_mapping(model, config.task_type),
        "base_model_name_or_path": base_name(model, config) or "",
        "revision": config.revision,
        "inference_mode": True,
        "r": config.r,
        "k": config.k,
        "t": config.t,
        "p": config.p,
        "alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "target_modules": exact_targets([published[layer] for layer in layers], published.values()),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": config.modules_to_save and sorted(config.modules_to_save),
        "bias": config.bias,
        "init_weights": config.init_weights,
        "ec_perturb_scale": config.perturb_scale,
        "use_kaiming_init_ec": config.init_router == "kaiming",
        "use_alb": False,
        "alb_gamma": config.balance_rate,
        "router_name": config.router_module or "",
        "dump_input_and_ec": False,
        "log_expert_load": 0,
    }
