"""The model and the batch under examination, and the state they are examined in.

Shape legend: B samples of a batch, S positions, K groups, T experts in a group (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..calibration import as_found, device_of, run_batch
from ..config import TuckAConfig
from ..dispatch import Dispatcher
from ..inputs import Inputs, parameter_names, read_inputs
from ..layer import TuckALayer
from ..model import dispatchers_of, layers_of, single_adapter_name
from ..recording import record_routes, unrecorded
from ..routing import Route
from ..scope import replaced
from ..tensors import ExpertTensor


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, one of its adapters and a batch.

    Attributes
    ----------
    trained : dict of Parameter
        What trained when the examination began and has to do with the adapter: all but other adapters; of an adapter
        loaded for inference, its own parameters.
    inference : bool
        Whether none of the adapter's own parameters trained.
    """

    model: nn.Module
    batch: Any
    adapter_name: str
    trained: dict[str, nn.Parameter]
    inference: bool

    @classmethod
    def of(cls, model: nn.Module, batch: Any, adapter_name: str | None) -> Subject:
        """Look at a model before anything about it is changed."""
        name = single_adapter_name(model, adapter_name)
        mine = {key: value for key, value in model.named_parameters() if not _of_another_adapter(key, name)}
        trained = {key: value for key, value in mine.items() if value.requires_grad}
        inference = not any(map(is_own, trained))
        if inference:
            trained = {key: value for key, value in mine.items() if is_own(key)}
        return cls(model, batch, name, trained, inference)

    # --- what the model is ---------------------------------------------------------------------------------------

    @property
    def base(self) -> nn.Module:
        """The adapted model without PEFT's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def layers(self) -> list[TuckALayer]:
        """The layers that carry the adapter."""
        return [layer for layer in layers_of(self.model) if self.adapter_name in layer.tucka_experts]

    @property
    def experts(self) -> dict[str, ExpertTensor]:
        """The experts of the adapter, by layer name."""
        return {layer.name: layer.tucka_experts[self.adapter_name] for layer in self.layers}  # type: ignore[misc]

    @property
    def dispatchers(self) -> dict[str, Dispatcher]:
        """The dispatchers that have a router of the adapter, by tower name."""
        return dispatchers_of(self.model, self.adapter_name)

    @property
    def config(self) -> TuckAConfig:
        """The adapter's configuration."""
        return next(dispatcher.router(self.adapter_name).config for dispatcher in self.dispatchers.values())

    @property
    def own(self) -> dict[str, Tensor]:
        """Every tensor that the adapter's experts and routers hold, by name."""
        held: dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {key: value for key, value in held.items() if is_own(key) and not _of_another(key, self.adapter_name)}

    # --- running it ----------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> Inputs:
        """What the batch says of itself."""
        base, batch = self.base, self.batch
        main_input = base.main_input_name if isinstance(base, PreTrainedModel) else ""
        args = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        kwargs = dict(batch) if isinstance(batch, Mapping) else {}
        return read_inputs(base, parameter_names(base), main_input, args, kwargs)

    @property
    def has_decoder(self) -> bool:
        """Whether the model is an encoder–decoder."""
        return isinstance(self.base, PreTrainedModel) and bool(self.base.config.is_encoder_decoder)

    @property
    def samples(self) -> int:
        """Samples of the batch."""
        return self.inputs.samples or 0

    def run(self, batch: Any = None) -> Any:
        """The model's output for the batch, or for another one."""
        return run_batch(self.model, self.batch if batch is None else batch, device_of(self.model))

    def routed(self, batch: Any = None) -> tuple[Any, dict[str, list[Route]]]:
        """The model's output, and the adapter's routes by tower."""
        with torch.no_grad(), self.recorded() as routes:
            output = self.run(batch)
        return output, routes

    @contextmanager
    def recorded(self) -> Iterator[dict[str, list[Route]]]:
        """Record the adapter's routes by tower, however many towers there are."""
        with record_routes(self.model, self.adapter_name) as routes:
            yield routes if isinstance(routes, dict) else dict.fromkeys(self.dispatchers, routes)

    def part(self, start: int, stop: int) -> Any:
        """Some samples of the batch."""
        return _part(self.batch, start, stop, self.samples)


def is_own(key: str) -> bool:
    """Whether a key is that of a tensor of experts or a router."""
    return ".tucka_experts." in key or ".tucka_router." in key


def _of_another(key: str, name: str) -> bool:
    """Whether the key of a tensor of experts or a router is another adapter's."""
    return f".tucka_experts.{name}." not in key and f".tucka_router.{name}." not in key


def _of_another_adapter(key: str, name: str) -> bool:
    if is_own(key):
        return _of_another(key, name)
    return ".modules_to_save." in key and f".modules_to_save.{name}." not in key


def _part(value: Any, start: int, stop: int, samples: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _part(item, start, stop, samples) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_part(item, start, stop, samples) for item in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == samples:
        return value[start:stop]
    return value


# --- the state it is examined in -------------------------------------------------------------------------------------


@contextmanager
def examined(subject: Subject) -> Iterator[None]:
    """Evaluation mode, the adapter alone, no checkpointing, nobody's recordings; everything is put back.

    Nothing trains: a check of gradients says what does.
    """
    name = subject.adapter_name
    with ExitStack() as stack:
        for module in subject.model.modules():
            if isinstance(module, PreTrainedModel):  # a forward with labels writes problem_type into it
                stack.callback(_put_back, module.config, dict(vars(module.config)))
        stack.enter_context(as_found(subject.model))
        stack.enter_context(checkpointing(subject.model, None))
        for module in subject.model.modules():
            saves = isinstance(module, AuxiliaryTrainingWrapper) and name in module._adapters
            if saves or isinstance(module, TuckALayer):
                stack.enter_context(replaced(module, _active_adapter=[name], _disable_adapters=False))
        stack.enter_context(unrecorded(dispatchers_of(subject.model).values()))
        yield


def _put_back(holder: Any, attributes: dict[str, Any]) -> None:
    vars(holder).clear()
    vars(holder).update(attributes)


@contextmanager
def checkpointing(model: nn.Module, use_reentrant: bool | None) -> Iterator[list[nn.Module]]:
    """Switch gradient checkpointing on, in one of its variants, or off (None); yield the blocks it is about.

    The switches of the blocks are set as transformers sets them, but no hook is left on the embeddings.
    """
    names = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [{name: value for name, value in vars(block).items() if name in names} for block in blocks]
    on = use_reentrant is not None
    for block in blocks:
        # In evaluation mode blocks are not checkpointed; what is inside them (dropout) stays in it.
        block.training = block.gradient_checkpointing = on
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=bool(use_reentrant))
    try:
        yield blocks
    finally:
        for block, attributes in zip(blocks, before):
            for name in names:
                vars(block).pop(name, None)
            vars(block).update(attributes)
