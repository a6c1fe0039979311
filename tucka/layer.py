"""An adapted linear layer.

Shape legend: D input features, O output features, N routed units, R rank (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.other import is_gptqmodel_quant_linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import ops
from .config import TuckAConfig
from .dispatch import Dispatcher
from .routing import Router
from .starts import start_experts
from .tensors import ExpertTensor

QUANTIZED = ("HQQLinear", "EetqLinear", "QuantizedLinear", "PatchedLinear", "TorchaoLinear")
"""Class names of quantised linears that PEFT wraps and that are no `nn.Linear`."""


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(D, O) of a layer that can be adapted, or None.

    `nn.MultiheadAttention` reads the weight of its output projection without calling it, so adapting that layer would
    change nothing; it counts as not adaptable.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    known = isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__ in QUANTIZED
    if not known and not is_gptqmodel_quant_linear(module):
        return None
    in_features, out_features = _get_in_out_features(module)
    return None if in_features is None or out_features is None else (in_features, out_features)


class TuckALayer(nn.Module, BaseTunerLayer):
    """A linear layer (dense, Conv1D or quantised) and its Tucker experts, one set per adapter.

    Parameters
    ----------
    base_layer : Module
        Called as it is; nothing is read from its weight.
    name : str
        Name of the layer in its model, for errors.
    dispatcher : Dispatcher
        Hands out the route of every forward.
    """

    adapter_layer_names = ("tucka_experts", "tucka_router")
    other_param_names = ("tucka_alpha", "tucka_form", "tucka_routed")

    def __init__(self, base_layer: nn.Module, name: str, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.dispatcher = dispatcher
        features = linear_features(self.get_base_layer())
        if features is None:
            raise ValueError(f"layer {name!r} is a {type(self.get_base_layer()).__name__}, which cannot be adapted")
        self.in_features, self.out_features = features
        self.tucka_experts = nn.ModuleDict()
        self.tucka_router = nn.ModuleDict()
        self.tucka_alpha: dict[str, float] = {}
        self.tucka_form: dict[str, str] = {}
        self.tucka_routed: dict[str, bool] = {}

    def update_layer(
        self,
        adapter_name: str,
        config: TuckAConfig,
        rank: int,
        *,
        factors_of: Optional[ExpertTensor] = None,
        routed: bool = True,
        routes: bool = False,
        router_sources: Optional[tuple[str, ...]] = None,
    ) -> None:
        """Add the experts of an adapter, and with `routes` the router of the whole tower.

        A layer that runs before the router (not `routed`) has a single expert, which is always active.
        """
        placement = self._placement()
        additive = config.form == "additive"
        groups, per_group, shared_rank = (config.k, config.t, config.p) if routed else (1, 1, 1)
        experts = ExpertTensor.new(
            (groups, per_group, self.in_features, self.out_features if additive else self.in_features),
            (shared_rank, rank),
            tie_factors=config.tie_factors and not additive,
            shared_expert=config.shared_expert and routed,
            factors_of=factors_of,
            normalize=config.normalize,
            hold_factors=config.trainable == "core",
            lasso=config.lasso,
            **placement,
        )
        start_experts(experts, config)
        self.tucka_experts[adapter_name] = experts
        self.tucka_alpha[adapter_name] = config.alpha
        self.tucka_form[adapter_name] = config.form
        self.tucka_routed[adapter_name] = routed
        if routes:
            self.tucka_router[adapter_name] = Router(config, self.in_features, router_sources, **placement)
            self.dispatcher.router_owners[adapter_name] = self
        self.set_adapter(self.active_adapters)

    def _placement(self) -> dict[str, Any]:
        """Device of the base layer; single precision at least, whatever the weight is stored in."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the active adapters to x (..., D); several at once add their updates."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.tucka_experts]
        adapted = x
        for name in names:
            if self.tucka_form[name] == "multiplicative":
                adapted = self._add_update(adapted, name, x)
        y = self.base_layer(adapted, *args, **kwargs)
        for name in names:
            if self.tucka_form[name] == "additive":
                y = self._add_update(y, name, x)
        return y

    def _add_update(self, onto: Tensor, adapter_name: str, x: Tensor) -> Tensor:
        """Add α x U M Vᵀ at the route of this forward; x is (..., D), `onto` (..., O)."""
        experts: Any = self.tucka_experts[adapter_name]
        group, gates = self._group_and_gates(adapter_name, x)
        with torch.autocast(device_type=x.device.type, enabled=False):  # R×R work, in the parameters' precision
            mix = experts.mix(group, gates)
        mix = (mix * self.tucka_alpha[adapter_name]).to(x.dtype)
        return ops.add_low_rank_update(onto, x, experts.input_mode.to(x), mix, experts.output_mode.to(onto))

    def _group_and_gates(self, adapter_name: str, x: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
        if not self.tucka_routed[adapter_name]:
            return torch.zeros(1, dtype=torch.long, device=x.device), torch.ones(1, 1, device=x.device)
        route = self.dispatcher.route(adapter_name, self.name, x)
        return (None, None) if route is None else route.to(x.device)[:2]

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Run the base layer alone."""
        before, self._disable_adapters = self._disable_adapters, True
        try:
            yield
        finally:
            self._disable_adapters = before

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Refused: the update depends on the route of each forward, a weight cannot."""
        raise ValueError(
            f"layer {self.name!r} cannot be merged: its update depends on the route of each forward. "
            "Keep the adapter, or unload() it"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's experts and router."""
        super().delete_adapter(adapter_name)
        self.dispatcher.router_owners.pop(adapter_name, None)

    def __repr__(self) -> str:
        return "tucka." + super().__repr__()
