"""Where a model needs a router: once, or once per tower.

A model with one backbone has one router. An encoder–decoder has one, fed in the encoder. A model that holds several
pretrained models side by side (text and vision towers, a vision tower before a language model) has one for each, and
an adapted layer outside all of them (a projection between towers) routes by its own input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Optional

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .checkpointing import checkpointed_modules, keep_routes, release_routes
from .dispatch import Dispatcher
from .inputs import parameter_names

SHARED_INPUT_METHODS = {
    "DisentangledSelfAttention": ("disentangled_attention_bias", "disentangled_att_bias"),
}
"""Methods, by class, that apply adapted layers to relative positions: an input that all samples of a batch share."""


class Tower(NamedTuple):
    """Part of a model with one router: the name of its root module, and of its encoder if that takes the route."""

    name: str
    encoder: Optional[str] = None


def find_towers(model: nn.Module) -> list[Tower]:
    """The towers of a model; their names are module names, the empty name is the model itself.

    The answer depends on the model alone, so adapters with different targets agree on it.
    """
    return _towers_below(model, "") or [Tower("")]


def _towers_below(model: nn.Module, root: str) -> list[Tower]:
    node, path = model, root
    while True:
        if _is_encoder_decoder(node):
            return [Tower(root, _name_of_encoder(model, node))]
        inner = _inner_models(node)
        if len(inner) != 1:
            break
        ((name, node),) = inner
        path = f"{path}.{name}" if path else name
    if not inner:
        return [Tower(root)]
    return [tower for name, child in inner for tower in _side_tower(model, child, f"{path}.{name}" if path else name)]


def _side_tower(model: nn.Module, child: nn.Module, path: str) -> list[Tower]:
    """Towers of one of several models side by side; its names count from the whole model."""
    prefix = f"{path}."
    return [
        Tower(f"{prefix}{tower.name}" if tower.name else path, tower.encoder and prefix + tower.encoder)
        for tower in _towers_below(child, "")
    ]


def _inner_models(node: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost pretrained models inside a module that hold a linear layer, by name."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in node.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if name and not inside and isinstance(module, PreTrainedModel) and _has_linear(module):
            found.append((name, module))
    return found


def _has_linear(module: nn.Module) -> bool:
    return any("Linear" in type(child).__name__ or "Conv1D" in type(child).__name__ for child in module.modules())


def _is_encoder_decoder(node: nn.Module) -> bool:
    return isinstance(node, PreTrainedModel) and bool(node.config.is_encoder_decoder)


def _name_of_encoder(model: nn.Module, node: nn.Module) -> str | None:
    encoder = node.get_encoder()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is encoder and module is not node), None)


def tower_of(layer_name: str, towers: list[Tower]) -> Tower:
    """The tower a layer lies in; one that lies in none is its own."""
    for tower in towers:
        if not tower.name or layer_name.startswith(f"{tower.name}."):
            return tower
    return Tower(layer_name)


class Attachment:
    """The hooks of one dispatcher on the root module of its tower, and their removal."""

    def __init__(self, dispatcher: Dispatcher, root: nn.Module) -> None:
        self.dispatcher = dispatcher
        self.root = root
        self._checkpointed = checkpointed_modules(self.root)
        self._handles: list[RemovableHandle] = []
        for module in self._entries():
            self._hook(module)
        self._shared = [(module, name) for module in self.root.modules() for name in _shared_input_methods(module)]
        for module, name in self._shared:
            method: Callable = getattr(module, name)
            setattr(module, name, partial(dispatcher.call_with_shared_input, method))

    def _entries(self) -> list[nn.Module]:
        """The root, and every pretrained model inside it: each may be called on its own."""
        inner: list[nn.Module] = [module for module in self.root.modules() if isinstance(module, PreTrainedModel)]
        return inner if self.root in inner else [self.root, *inner]

    def _hook(self, module: nn.Module) -> None:
        main_input = module.main_input_name if isinstance(module, PreTrainedModel) else ""
        opening = partial(self.dispatcher.open, parameter_names(module), main_input)
        self._handles += [
            module.register_forward_pre_hook(opening, with_kwargs=True),
            module.register_forward_pre_hook(partial(_keep_routes, self.dispatcher, self._checkpointed)),
            module.register_forward_hook(self.dispatcher.close, always_call=True),
        ]

    def remove(self) -> None:
        """Take all hooks off the model again."""
        for handle in self._handles:
            handle.remove()
        for module, name in self._shared:
            delattr(module, name)
        release_routes(self._checkpointed)


def _keep_routes(dispatcher: Dispatcher, modules: list[nn.Module], module: nn.Module, args: tuple) -> None:
    keep_routes(dispatcher, modules)


def _shared_input_methods(module: nn.Module) -> list[str]:
    methods = SHARED_INPUT_METHODS.get(type(module).__name__, ())
    return [name for name in methods if name in dir(type(module))]
