"""The arms of the speed benchmark: the frozen base, PEFT's LoRA and TuckA's settings, over one base model's weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import tucka
from analysis.parameters import layer_shapes
from tucka import TuckAConfig

from .arms import parse_settings
from .shapes import Setting, sharing_copy

Batch = dict[str, Any]

TUCKA: dict[str, dict[str, Any]] = {
    "tucka": {},
    "tucka-batch": {"routing": "batch"},
    "tucka-multiplicative": {"form": "multiplicative"},
    "tucka-core": {"trainable": "core", "axis_block_size": None},
    "tucka-core-batch": {"trainable": "core", "axis_block_size": None, "routing": "batch"},
}
"""What each arm changes in the library's default."""

TRAINED = ("frozen", "frozen-outputs", "lora", *TUCKA, "tucka-paper")
"""Arms of a training step; any of them may be given fields of its configuration: "tucka:k=8,t=2"."""

RUN = ("frozen", "lora", "tucka", "tucka-batch", "tucka-multiplicative", "tucka-paper")
"""Arms of a forward; where nothing is trained, training the cores alone is no arm of its own."""

MERGED = ("frozen", "lora-merged", "tucka-merged", "tucka-exported")
"""The base, and adapters folded into its weights: as they are, or written as a LoRA that PEFT reads and merges."""


class Arm(NamedTuple):
    """A model ready to be measured."""

    name: str
    model: nn.Module
    optimiser: torch.optim.Optimizer | None  # None: nothing to train


def build(text: str, base: nn.Module, setting: Setting, batch: Batch) -> Arm:
    """Build the arm of a name, its router started, over the weights of `base`.

    Raises
    ------
    ValueError
        If there is no such arm.
    """
    name, _, listed = text.partition(":")
    if name not in BUILDERS:
        raise ValueError(f"arms are {', '.join(BUILDERS)}, each with :name=value,… or without; got {text!r}")
    model = BUILDERS[name](sharing_copy(base), setting, batch, parse_settings(listed)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Fused is what transformers' Trainer takes, and costs the least where many small tensors train.
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    if setting.compiled:
        model.compile()
    return Arm(text, model, optimiser)


def training_step(arm: Arm, batch: Batch) -> None:
    """Forward, backward, AdamW."""
    arm.model(**batch).loss.backward()
    if arm.optimiser is not None:
        arm.optimiser.step()
        arm.optimiser.zero_grad(set_to_none=True)


@torch.no_grad()
def inference(arm: Arm, batch: Batch) -> None:
    """A forward without gradient."""
    arm.model(**batch)


def config_of(name: str, setting: Setting, **own: Any) -> LoraConfig | TuckAConfig | None:
    """The configuration of an arm that has one."""
    fields = {"r": setting.rank, "target_modules": setting.target_modules, **own}
    if name.startswith("lora"):
        return LoraConfig(lora_alpha=2 * fields["r"], lora_dropout=0.0, **fields)
    if name.startswith("tucka"):
        return TuckAConfig.paper(**fields) if name == "tucka-paper" else TuckAConfig(**TUCKA.get(name, {}), **fields)
    return None


def _frozen(base: nn.Module, setting: Setting, batch: Batch, own: dict[str, Any]) -> nn.Module:
    """Nothing to train, and yet a backward through the activations: down to the input embeddings, and no further."""
    embeddings: Any = base.get_input_embeddings()  # type: ignore[operator]
    return _anchored(base, [embeddings], setting)


def _frozen_to_outputs(base: nn.Module, setting: Setting, batch: Batch, own: dict[str, Any]) -> nn.Module:
    """Nothing to train, and a backward down to the outputs of what the others adapt: the least that any of them needs.

    It leaves out what lies below in the first block.
    """
    selection: Any = LoraConfig(target_modules=setting.target_modules)
    layers = [base.get_submodule(shape.name) for shape in layer_shapes(base, selection)]
    return _anchored(base, layers, setting)


def _anchored(base: nn.Module, modules: Iterable[nn.Module], setting: Setting) -> nn.Module:
    """Let gradients begin at the outputs of modules, where none flows without."""
    # A sum with a scalar, since `requires_grad_` on an output would break a compiled graph.
    anchor = torch.zeros((), dtype=getattr(torch, setting.dtype), device=setting.device, requires_grad=True)

    def anchored(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad or not torch.is_grad_enabled() else output + anchor

    for module in modules:
        module.register_forward_hook(anchored)
    return base


def _adapted(name: str) -> Callable[..., nn.Module]:
    def build(base: nn.Module, setting: Setting, batch: Batch, own: dict[str, Any]) -> nn.Module:
        config: Any = config_of(name, setting, **own)
        if isinstance(config, LoraConfig):
            return get_peft_model(base, config)
        return started(tucka.apply(base, config), batch)

    return build


def started(model: nn.Module, batch: Batch) -> nn.Module:
    """A model whose router has seen a training batch."""
    model.train()(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return model


def _merged(name: str, **route: int) -> Callable[..., nn.Module]:
    def build(base: nn.Module, setting: Setting, batch: Batch, own: dict[str, Any]) -> nn.Module:
        adapted: Any = _adapted(name)(base, setting, batch, own)
        return adapted.merge_and_unload(**route)

    return build


def _exported(base: nn.Module, setting: Setting, batch: Batch, own: dict[str, Any]) -> nn.Module:
    from tucka.export import to_lora

    adapted: Any = _adapted("tucka")(base, setting, batch, own)
    with tempfile.TemporaryDirectory() as directory:
        to_lora(adapted, directory, route=0)
        (found,) = Path(directory).rglob("adapter_config.json")
        loaded: Any = PeftModel.from_pretrained(adapted.unload(), str(found.parent))
    return loaded.merge_and_unload()


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "frozen": _frozen,
    "frozen-outputs": _frozen_to_outputs,
    **{name: _adapted(name) for name in ("lora", *TUCKA, "tucka-paper")},
    "lora-merged": _merged("lora"),
    "tucka-merged": _merged("tucka", route=0),
    "tucka-exported": _exported,
}
"""Of (base copy, setting, batch, own fields), by the name of the arm."""
