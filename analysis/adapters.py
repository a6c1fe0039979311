"""Adapters as numbers: read from a model, or from a directory without its base model.

Shape legend: K groups, T experts in a group, P rank shared in a group, R rank of an expert, D and O the features of a
layer's two sides, F length of a routing feature (see `tucka.ops`). All tensors are float64 on the CPU, and act as they
are: normalisation is folded in, the scale α is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from tucka import TuckAConfig
from tucka.model import LASSO_NAMES, layers_of, single_adapter_name
from tucka.placement import Placement
from tucka.registration import PEFT_TYPE
from tucka.state import FILE_PREFIX, PUBLISHED_KEYS, header_shapes
from tucka.tensors import ExpertTensor

EXPERTS, ROUTER = ".tucka_experts.", ".tucka_router."


class LayerExperts(NamedTuple):
    """The experts of one adapted layer.

    Attributes
    ----------
    name : str
        The layer's name in the base model.
    core : Tensor, (K, P, R, R)
    expert_factor : Tensor, (T, P)
    input_factor, output_factor : Tensor, (D, R) and (O, R)
        The same where the D-modes are tied.
    shared : Tensor, (R, R), or None
        The always-active slice.
    alpha : float
        Scale of the update.
    form : str
        "multiplicative" or "additive".
    axes : Tensor, (A, A, D/A), or None
        The always-active slice on the input's own axes, which α does not scale.
    """

    name: str
    core: Tensor
    expert_factor: Tensor
    input_factor: Tensor
    output_factor: Tensor
    shared: Tensor | None
    alpha: float
    form: str
    axes: Tensor | None = None

    @property
    def groups(self) -> int:
        """K."""
        return self.core.shape[0]

    @property
    def experts(self) -> int:
        """T."""
        return self.expert_factor.shape[0]

    @property
    def slices(self) -> Tensor:
        """Every expert between its factors, Σ_p C[j,p] 𝒢[i,p]: (K, T, R, R)."""
        return torch.einsum("tp,kpqr->ktqr", self.expert_factor, self.core)


class RouterWeights(NamedTuple):
    """The router of one tower.

    Attributes
    ----------
    layer : str
        Name of the layer that holds it.
    centroids : Tensor, (K·T, Q)
        Of placed features.
    placement : tucka.placement.Placement
        How features are placed among the centroids.
    """

    layer: str
    centroids: Tensor
    placement: Placement

    def placed(
        self,
        features: Tensor,  # (N, F)
    ) -> Tensor:  # (N, Q)
        """Features as they lie among the centroids."""
        return self.placement(features.to(self.centroids))


class Adapter(NamedTuple):
    """All that a Tucker adapter has learnt.

    Attributes
    ----------
    name : str
        Of the adapter, or of its directory.
    config : TuckAConfig
    layers : tuple of LayerExperts
        In the order of the model, or by the numbers in their names.
    routers : tuple of RouterWeights
        One for each tower; none where no layer is routed.
    """

    name: str
    config: TuckAConfig
    layers: tuple[LayerExperts, ...]
    routers: tuple[RouterWeights, ...]

    def layer(self, name: str) -> LayerExperts:
        """The layer of that name, or the only one whose name ends so.

        Raises
        ------
        ValueError
            If there is not exactly one.
        """
        found = [layer for layer in self.layers if layer.name == name] or [
            layer for layer in self.layers if layer.name.endswith(f".{name}")
        ]
        if len(found) != 1:
            raise ValueError(f"{name!r} names {len(found)} of the {len(self.layers)} adapted layers, not one")
        return found[0]


def adapter_of(model: nn.Module, adapter_name: str | None = None) -> Adapter:
    """Read an adapter of a model; default: the active one.

    Raises
    ------
    ValueError
        If the model has no Tucker experts, or no such adapter.
    """
    name = single_adapter_name(model, adapter_name)
    configs: Any = model.peft_config
    held: list[Any] = [layer for layer in layers_of(model) if name in layer.tucka_experts]
    parts = {layer.name: _tensors_of(layer, name) for layer in held}
    return _adapter(name, configs[name], parts)


def read_adapter(directory: str | Path) -> Adapter:
    """Read an adapter saved by tucka, or by the paper's published code, without its base model.

    Raises
    ------
    FileNotFoundError
        If the directory lacks the configuration or the weights.
    ValueError
        If the adapter is another method's, if its files disagree, or if the layer that owns a shared factor cannot be
        told from names and shapes alone.
    """
    directory = Path(directory)
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory} holds no {file}: it is no directory of a saved adapter")
    _require_tucka(directory / CONFIG_NAME)
    config = TuckAConfig.from_pretrained(str(directory))
    header_shapes(directory / SAFETENSORS_WEIGHTS_NAME)
    tensors = _by_layer(load_file(directory / SAFETENSORS_WEIGHTS_NAME))
    if not any("core" in own for own in tensors.values()):
        raise ValueError(f"{directory / SAFETENSORS_WEIGHTS_NAME} holds {len(tensors)} layers, none with a core")
    return _adapter(directory.resolve().name, config, tensors)


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts names by the numbers in them: layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdecimal() and len(part) < 20 else (1, part) for part in parts]


def _require_tucka(path: Path) -> None:
    try:
        method = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object") from error
    if method != PEFT_TYPE:
        raise ValueError(f"{path} configures a {method} adapter; what is analysed here are {PEFT_TYPE} adapters")


def _by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of every layer, by their short names, layers in natural order."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(state, key=natural):
        stem, _, end = key.rpartition(".")
        renamed = f"{stem}.{PUBLISHED_KEYS[end]}" if end in PUBLISHED_KEYS else key
        for mark in (EXPERTS, ROUTER):
            layer, found_mark, part = renamed.removeprefix(FILE_PREFIX).partition(mark)
            if found_mark:
                found.setdefault(layer, {})[part] = state[key]
    return found


def _tensors_of(layer: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a layer as a file holds them: a shared factor is its owner's."""
    held = {**layer.tucka_experts[name].state_dict()}
    if name in layer.tucka_router:
        held |= layer.tucka_router[name].state_dict()
    return held


def _adapter(name: str, config: TuckAConfig, tensors: Mapping[str, Mapping[str, Tensor]]) -> Adapter:
    """Put the tensors of all layers together, those that own their factors first."""
    parts = {layer: own for layer, own in tensors.items() if "core" in own}
    experts = {layer: _expert_tensor(layer, own, None, config) for layer, own in parts.items() if "input_factor" in own}
    for layer, own in parts.items():
        if layer not in experts:
            owner = (config.factor_owners or {}).get(layer) or _likely_owner(layer, own, parts)
            if "input_factor" not in parts.get(owner, {}):
                raise ValueError(f"layer {layer!r} shares the factors of {owner!r}, which has none of its own")
            experts[layer] = _expert_tensor(layer, own, experts[owner], config)
    layers = tuple(_layer(layer, experts[layer], config) for layer in parts)
    routers = tuple(_router(layer, own) for layer, own in tensors.items() if "centroids" in own)
    return Adapter(name, config, layers, routers)


def _likely_owner(name: str, own: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The layer whose factors a layer shares: one of its name, its block aside, else one of its last name and rank."""

    def blockless(layer: str) -> str:
        return re.sub(r"\d+", "#", layer)

    leaf, rank = name.rpartition(".")[2], own["core"].shape[-2]
    owners = [
        other
        for other, tensors in parts.items()
        if "input_factor" in tensors and other.rpartition(".")[2] == leaf and tensors["core"].shape[-2] == rank
    ]
    found = [other for other in owners if blockless(other) == blockless(name)] or owners
    if len(found) != 1:
        raise ValueError(
            f"layer {name!r} shares its factors with one of {len(found)} layers ({', '.join(found) or 'none'}), which "
            "names and shapes do not tell; load the adapter into its model and read it from there (adapter_of)"
        )
    return found[0]


def _expert_tensor(
    name: str, own: Mapping[str, Tensor], owner: ExpertTensor | None, config: TuckAConfig
) -> ExpertTensor:
    def parameter(part: str) -> nn.Parameter | None:
        held: Any = _double(own.get(part))
        return None if held is None else nn.Parameter(held, requires_grad=False)

    core, expert_factor = parameter("core"), parameter("expert_factor")
    if core is None or expert_factor is None:
        raise ValueError(f"layer {name!r} has a core but no expert factor")
    try:
        experts = ExpertTensor(
            core,
            expert_factor,
            parameter("input_factor"),
            parameter("output_factor"),
            held_input=parameter("held_input"),
            held_output=parameter("held_output"),
            shared_core=parameter("shared_core"),
            axis_core=parameter("axis_core"),
            factors_of=owner,
            normalize=config.normalize,
            core_gain=config.core_gain,
            axis_bound=config.axis_bound,
            lasso=config.lasso,
        )
    except ValueError as error:
        raise ValueError(f"the tensors of layer {name!r} do not fit together: {error}") from error
    for part in LASSO_NAMES:
        if part in own:
            experts.register_parameter(part, parameter(part))
    return experts


@torch.no_grad()
def _layer(name: str, experts: ExpertTensor, config: TuckAConfig) -> LayerExperts:
    core, (_, expert_factor, input_factor, output_factor) = experts.decomposition
    parts = (core, expert_factor, input_factor, output_factor, experts.shared_slice)
    return LayerExperts(name, *parts, alpha=config.alpha, form=config.form, axes=experts.axis_blocks)


def _router(layer: str, own: Mapping[str, Tensor]) -> RouterWeights:
    placement = Placement(*(_double(own.get(part)) for part in Placement._fields))
    return RouterWeights(layer, own["centroids"].detach().to("cpu", torch.float64), placement)


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", torch.float64)
