"""The router alone: which LoRA serves a request, for engines that host the groups of an adapter as LoRAs.

Shape legend: N routed units, B samples, S positions, D features, F length of a routing feature, K groups (see
`tucka.ops`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..calibration import device_of, run_batch
from ..config import TuckAConfig
from ..dispatch import Dispatcher
from ..files import replace_together
from ..inputs import Inputs
from ..model import dispatchers_of, layers_of, single_adapter_name
from ..recording import unrecorded
from ..routing import Router
from ..scope import replaced
from ..towers import Attachment, Tower, find_towers
from .factors import LowRank, low_rank_update

CONFIG_FILE, WEIGHTS_FILE = "tucka_router.json", "tucka_router.safetensors"

FORMAT_VERSION = 1

ROUTER_FIELDS = (
    "k", "t", "routing", "affinity", "temperature", "pooling", "components", "pool_padding", "pool_answers",
    "balance_bias", "expert_shares", "init_router",
)  # fmt: skip
"""What of a configuration says how a trained router chooses."""


class _Found(Exception):
    """Ends a forward that has reached the router's layer."""

    def __init__(self, feature: Tensor, samples: int) -> None:
        self.feature, self.samples = feature, samples


class ServingRouter:
    """Names the LoRA that serves a request, as the whole adapted model would choose its group.

    Take one from an adapted model (`of`) or from an export (`load`). `choose` takes the input of the router's layer;
    `lora_for` runs a base model as far as that layer.

    Parameters
    ----------
    router : Router
    names : sequence of str
        Name of the LoRA of every group.
    tower : Tower
        The part of the model that the router serves.
    layers : sequence of str
        Layers whose input may feed it; the first of them to run does.
    before : dict of LowRank, optional
        Updates of layers that run before the router (`router_depth`): they act in every route.
    """

    def __init__(
        self,
        router: Router,
        names: Sequence[str],
        tower: Tower,
        layers: Sequence[str],
        before: Optional[Mapping[str, LowRank]] = None,
    ) -> None:
        if len(names) != router.config.k:
            raise ValueError(f"a router of k={router.config.k} groups needs as many names, but got {len(names)}")
        self.router = router.eval().requires_grad_(False)
        self.names, self.tower, self.layers, self.before = tuple(names), tower, tuple(layers), dict(before or {})

    # --- from a model and from files ---------------------------------------------------------------------------------

    @classmethod
    def of(cls, model: nn.Module, adapter_name: str | None = None, names: Sequence[str] | None = None) -> ServingRouter:
        """The router of an adapted model, copied.

        Parameters
        ----------
        model : PeftModel
            The adapted model.
        adapter_name : str, optional
            Default: the active adapter.
        names : sequence of str, optional
            Default: group-0, group-1, …, the directories `tucka.to_lora` writes.

        Raises
        ------
        ValueError
            If the model has several towers, or the router has not started.

        Warns
        -----
        UserWarning
            If the router's input depends on trained modules or biases before it, which a bare base model lacks.
        """
        name = single_adapter_name(model, adapter_name)
        dispatchers = dispatchers_of(model, name)
        if len(dispatchers) != 1:
            raise ValueError(
                f"a serving router is one router, but the model has {len(dispatchers)}: of {list(dispatchers)}"
            )
        ((tower_name, dispatcher),) = dispatchers.items()
        trained = dispatcher.router(name)
        if not bool(trained.initialised):
            raise ValueError("the router has not started: train or calibrate the adapter first")
        held = [layer for layer in layers_of(model) if name in layer.tucka_form and layer.dispatcher is dispatcher]
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        routed = [layer.name for layer in held if layer.tucka_routed[name]]
        _warn_of_trained_before(base, trained.config, routed[0])
        router = _new_router(trained.config, trained.width, trained.state_dict())
        before = {layer.name: low_rank_update(layer, name, None) for layer in held if not layer.tucka_routed[name]}
        tower = next((tower for tower in find_towers(base) if tower.name == tower_name), Tower(tower_name))
        names = [f"group-{group}" for group in range(router.config.k)] if names is None else names
        return cls(router, names, tower, trained.sources or routed, before)

    def save(self, directory: str | Path) -> None:
        """Write the router's two files, together or not at all."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        replace_together(directory, self.write)

    def write(self, folder: Path) -> None:
        """Write the router's two files into a folder."""
        fields = {field: getattr(self.router.config, field) for field in ROUTER_FIELDS}
        described = dict(
            format_version=FORMAT_VERSION, names=self.names, tower=self.tower, layers=self.layers,
            width=self.router.width, before=list(self.before), config=fields,
        )  # fmt: skip
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        tensors = {f"router.{key}": value for key, value in self.router.state_dict().items()}
        for layer, update in self.before.items():
            tensors.update({f"before.{layer}.{part}": value for part, value in update._asdict().items()})
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / WEIGHTS_FILE)

    @classmethod
    def load(cls, directory: str | Path) -> ServingRouter:
        """Read what `save`, or `tucka.to_lora` for all groups, has written.

        Raises
        ------
        ValueError
            If the files are of a later version.
        """
        described = json.loads((Path(directory) / CONFIG_FILE).read_text())
        if described["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"format_version={described['format_version']} of {CONFIG_FILE} is of a later tucka; this one reads up "
                f"to {FORMAT_VERSION}"
            )
        tensors = load_file(Path(directory) / WEIGHTS_FILE)
        state = {key.removeprefix("router."): value for key, value in tensors.items() if key.startswith("router.")}
        router = _new_router(TuckAConfig(**described["config"]), described["width"], state)
        before = {name: LowRank(*(tensors[f"before.{name}.{part}"] for part in "ab")) for name in described["before"]}
        return cls(router, described["names"], Tower(*described["tower"]), described["layers"], before)

    # --- choosing ----------------------------------------------------------------------------------------------------

    def choose(
        self,
        hidden: Tensor,  # (B, S, D), or (B, D) of pooled rows
        attention_mask: Tensor | None = None,  # (B, S)
    ) -> list[str]:
        """Name the LoRA of every sample from the input of the router's layer.

        Parameters
        ----------
        hidden : Tensor
            What enters the first adapted layer: in most models the normalised embeddings. With `router_depth` it is to
            include the updates of the layers before (`before`), which every group's LoRA holds.
        attention_mask : Tensor, optional
            1 for tokens that count: no padding, and of a conversation the prompt alone.

        Raises
        ------
        ValueError
            If the width is not the router's, or the mask does not fit.
        """
        if hidden.shape[-1] != self.router.width:
            raise ValueError(f"the router's layer has {self.router.width} input features, but got {hidden.shape[-1]}")
        samples, positions = hidden.shape[0], hidden.shape[1] if hidden.ndim > 2 else None
        inputs = Inputs(samples=samples, positions=positions, mask=attention_mask)
        with torch.no_grad():
            return self._names(self._feature(hidden, inputs, self.layers[0]), samples)

    def lora_for(self, model: nn.Module, batch: Any) -> list[str]:
        """Name the LoRA of every sample of a batch, running a model as far as the router's layer.

        Parameters
        ----------
        model : Module
            The base model in evaluation mode, bare or with LoRAs (which are left out meanwhile). One with the blocks up
            to the router's alone will do: ``from_pretrained(name, num_hidden_layers=1)``. Not to be called by several
            threads on one model at once.
        batch : mapping, tuple or Tensor
            What the model takes; labels are not needed.

        Raises
        ------
        ValueError
            If the model is in training mode, or the forward reaches no layer that feeds the router.
        """
        base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
        if base.training:
            raise ValueError("the model is in training mode, where dropout would choose as well; call model.eval()")
        modules = dict(base.named_modules())
        if not any(layer in modules for layer in self.layers):
            raise ValueError(
                f"the model has none of the {len(self.layers)} layers that feed the router: {self.layers[0]!r}, …"
            )
        with self._listening(base, modules), torch.no_grad():
            try:
                run_batch(base, batch, device_of(base))
            except _Found as found:
                return self._names(found.feature, found.samples)
        raise ValueError(f"the forward reached none of the {len(self.layers)} layers that feed the router")

    @contextmanager
    def _listening(self, base: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Hooks that read the batch, add what acts before the router, and stop at the router's layer."""
        with ExitStack() as stack:
            dispatcher = dispatchers_of(base).get(self.tower.name)
            if dispatcher is None:
                encoder = modules[self.tower.encoder] if self.tower.encoder else None
                dispatcher = Dispatcher(self.tower.name, encoder)
                stack.callback(Attachment(dispatcher, modules[self.tower.name]).remove)
            stack.enter_context(unrecorded([dispatcher]))
            for module in base.modules():
                if isinstance(module, BaseTunerLayer):
                    stack.enter_context(replaced(module, _disable_adapters=True))
            for name in self.layers:
                if name in modules:
                    hook = partial(self._stop, dispatcher, name)
                    stack.callback(modules[name].register_forward_pre_hook(hook).remove)
            for name, update in self.before.items():
                stack.callback(modules[name].register_forward_hook(partial(_add, update)).remove)
            yield

    def _stop(self, dispatcher: Dispatcher, layer_name: str, module: nn.Module, args: tuple) -> None:
        scope = dispatcher.current.scope
        if scope is not None:
            raise _Found(self._feature(args[0], scope.inputs, layer_name), scope.inputs.samples or 1)

    def _feature(self, x: Tensor, inputs: Inputs, layer_name: str) -> Tensor:  # (N, F)
        self.router.to(x.device)
        return Dispatcher.feature(self.router, layer_name, x, inputs, per_sample=self.router.per_sample)

    def _names(
        self,
        feature: Tensor,  # (N, F)
        samples: int,
    ) -> list[str]:
        groups = self.router(feature).group.tolist()
        return [self.names[group] for group in (groups if len(groups) == samples else groups * samples)]


def _new_router(config: TuckAConfig, width: int, state: dict[str, Tensor]) -> Router:
    """A router of its own with that state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that were warned of when the adapter was made
        fields = {field: getattr(config, field) for field in ROUTER_FIELDS}
        with torch.random.fork_rng(devices=[]):  # its centroids are overwritten
            router = Router(TuckAConfig(**fields), width, dtype=state["centroids"].dtype)
    router.load_state_dict(state)
    return router


def _add(update: LowRank, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    update = LowRank(*(part.to(args[0].device) for part in update))
    return output + update(args[0]).to(output)


def _warn_of_trained_before(base: nn.Module, config: TuckAConfig, first_layer: str) -> None:
    names = list(dict(base.named_modules()))
    before = names[: names.index(first_layer)]
    trained = [name for name in before if isinstance(base.get_submodule(name), AuxiliaryTrainingWrapper)]
    if config.bias == "all" or (config.bias == "tucka_only" and config.router_depth):
        trained.append(f"biases (bias={config.bias!r})")
    if trained:
        warnings.warn(
            f"the router's input depends on what was trained before it: {', '.join(trained)}. Give `lora_for` a model "
            "that has it, such as the base model with one of the exported LoRAs loaded",
            stacklevel=3,
        )
