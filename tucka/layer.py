"""An adapted linear layer.

Shape legend: D input features, O output features, N routed units, R rank (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.other import is_gptqmodel_quant_linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import ops, passes
from .config import TuckAConfig
from .decoding import Ready, make_ready
from .dispatch import Dispatcher
from .mixer import mix_layer
from .routing import Route, Router
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


class Update(NamedTuple):
    """x U M Vᵀ, not yet multiplied out."""

    form: str
    projected: Tensor  # (..., R)
    mix: Tensor  # (N, R, R)
    output_mode: Tensor  # (O, R)
    columns: int  # of the factors that train, unless none does


def _added(onto: Tensor, updates: list[Update], form: str, owned: bool) -> Tensor:
    """A layer's input (multiplicative form) or output (additive form) with the updates of that form."""
    for update in updates:
        if update.form == form:
            factor = update.output_mode.to(onto)
            overwrite = form == "additive"
            onto = passes.add_update(onto, update.projected, update.mix, factor, owned, overwrite, update.columns)
    return onto


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
    other_param_names = ("tucka_alpha", "tucka_form", "tucka_routed", "tucka_input_of")

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
        # Whose adapted input this layer takes, itself if it lends its own. A plain dictionary registers nothing twice.
        self.tucka_input_of: dict[str, TuckALayer] = {}
        dispatcher.mixer.layers[name] = self

    def update_layer(
        self,
        adapter_name: str,
        config: TuckAConfig,
        rank: int,
        *,
        factors_of: Optional[ExpertTensor] = None,
        input_of: Optional[TuckALayer] = None,
        routed: bool = True,
        routes: bool = False,
        router_sources: Optional[tuple[str, ...]] = None,
    ) -> None:
        """Add the experts of an adapter, and with `routes` the router of the whole tower.

        A layer that runs before the router (not `routed`) has a single expert, which is always active. One that takes
        the adapted input of another has no experts.
        """
        placement = self._placement()
        if input_of is None:
            self.tucka_experts[adapter_name] = self._new_experts(config, rank, factors_of, routed, placement)
        else:
            self.tucka_input_of[adapter_name] = input_of.tucka_input_of[adapter_name] = input_of
        self.tucka_alpha[adapter_name] = config.alpha
        self.tucka_form[adapter_name] = config.form
        self.tucka_routed[adapter_name] = routed
        if routes:
            self.tucka_router[adapter_name] = Router(config, self.in_features, router_sources, **placement)
            self.dispatcher.router_owners[adapter_name] = self
        self.set_adapter(self.active_adapters)

    def _new_experts(
        self,
        config: TuckAConfig,
        rank: int,
        factors_of: Optional[ExpertTensor],
        routed: bool,
        placement: dict[str, Any],
    ) -> ExpertTensor:
        additive = config.form == "additive"
        groups, per_group, shared_rank = (config.k, config.t, config.p) if routed else (1, 1, 1)
        experts = ExpertTensor.new(
            (groups, per_group, self.in_features, self.out_features if additive else self.in_features),
            (shared_rank, rank),
            block_width=config.block_width(rank),
            trained_columns=config.trained(rank),
            tie_factors=config.tie_factors and not additive,
            shared_expert=config.shared_expert and routed,
            axis_width=config.axis_width(self.in_features, self.out_features),
            factors_of=factors_of,
            normalize=config.normalize,
            core_gain=config.core_gain,
            axis_bound=config.axis_bound,
            hold_factors=config.trainable == "core",
            lasso=config.lasso,
            **placement,
        )
        start_experts(experts, config)
        return experts

    def _placement(self) -> dict[str, Any]:
        """Device of the base layer; single precision at least, whatever the weight is stored in."""
        base = self.get_base_layer()
        device, dtype = self._get_base_layer_device_and_dtype(base)
        if device is None:  # packed under another name than "weight", as HQQ does
            device = next((held.device for held in chain(base.parameters(), base.buffers())), None)
        return {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the active adapters to x (..., D); several at once add their updates."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.tucka_form]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if self._decodes:
            ready = self.dispatcher.current.ready.get(self.name)
            if ready is not None and ready.serves(names, x, self.dispatcher.current):
                return self._decoded(ready, x, *args, **kwargs)
        if all(name in self.tucka_input_of for name in names):
            return self.base_layer(self._shared_input(x, names), *args, **kwargs)
        owned, dtype = passes.may_overwrite(self.base_layer), passes.product_dtype(x)
        with passes.without_autocast(x):
            x, updates = self._updates(x, names, dtype, owned)
            x = _added(self._on_axes(x, names), updates, "multiplicative", owned)
        y = self.base_layer(x, *args, **kwargs)
        with passes.without_autocast(x):
            return _added(y, updates, "additive", owned)

    def _updates(self, x: Tensor, names: list[str], dtype: torch.dtype, owned: bool) -> tuple[Tensor, list[Update]]:
        """The updates of several adapters, and the input to go on with (see `passes.project`)."""
        source, updates = x, []
        x = x.to(dtype) if owned else x  # a plain layer would round it itself
        for name in names:
            mix, (input_mode, output_mode) = self._mix(name, source), self.modes(name)
            if dtype == torch.float16:
                input_mode, mix, output_mode = passes.within_range(input_mode, mix, output_mode)
            columns = self.experts_of(name).owner.trained_columns
            x, projected = passes.project(x, input_mode.to(x.device, dtype), owned, columns)
            updates.append(Update(self.tucka_form[name], projected, mix.to(dtype), output_mode, columns))
            if len(names) == 1 and name not in self.tucka_input_of and self._decodes:
                current, form = self.dispatcher.current, self.tucka_form[name]
                overwrite = owned and form == "additive"
                factors = input_mode.to(x.device, x.dtype), mix, output_mode, self.axis_blocks(name, x)
                ready = make_ready(current, names, form, *factors, overwrite)
                if ready is not None:
                    current.ready[self.name] = ready
        return x, updates

    @property
    def _decodes(self) -> bool:
        """Whether `generate` runs, outside of a compiled graph."""
        return not torch.compiler.is_compiling() and self.dispatcher.current.memory is not None

    def _decoded(self, ready: Ready, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer with an update that was made ready."""
        adapted = ready.adapt(x)
        if ready.form == "multiplicative":
            return self.base_layer(ready.add(adapted, x), *args, **kwargs)
        return ready.add(self.base_layer(adapted, *args, **kwargs), x)

    def _on_axes(self, x: Tensor, names: list[str]) -> Tensor:
        """X with the slices on its axes, each of which reads x."""
        adapted = x
        for name in names:
            blocks = self.axis_blocks(name, x)
            if blocks is not None:
                adapted = passes.add_on_axes(x, blocks) if adapted is x else adapted + ops.on_axes(x, blocks)
        return adapted

    def axis_blocks(self, adapter_name: str, x: Tensor) -> Optional[Tensor]:
        """E of an adapter, (A, A, D/A), for an input; None without such a slice."""
        blocks = self.experts_of(adapter_name).axis_blocks
        return None if blocks is None else blocks.to(x)

    def _shared_input(self, x: Tensor, names: list[str]) -> Tensor:
        """x', computed by whichever of the layers that read one tensor runs first."""
        makers = [(name, self.tucka_input_of[name].name) for name in names]
        known = self.dispatcher.adapted_input(makers, x)
        if known is None:
            dtype = passes.product_dtype(x)
            with passes.without_autocast(x):
                _, updates = self._updates(x, names, dtype, owned=False)  # several layers send gradients back
                known = _added(self._on_axes(x, names), updates, "multiplicative", False)
            self.dispatcher.lend_input(makers, x, known)
        return known

    def _mix(self, adapter_name: str, x: Tensor) -> Tensor:  # (N, R, R)
        """α M of every unit at the route of this forward."""
        if not self.tucka_routed[adapter_name]:
            always = Route(torch.zeros(1, dtype=torch.long, device=x.device), torch.ones(1, 1, device=x.device))
            return mix_layer(self, adapter_name, always)
        route = self.dispatcher.route(adapter_name, self.name, x)
        if route is None:
            return mix_layer(self, adapter_name, None)
        return self.dispatcher.mixer.mix(adapter_name, self, route, self.dispatcher.current)

    def experts_of(self, adapter_name: str) -> ExpertTensor:
        """The experts that act on this layer's input or output; those of another layer where it takes its input."""
        holder = self.tucka_input_of.get(adapter_name, self)
        return holder.tucka_experts[adapter_name]  # type: ignore[return-value]

    def modes(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """U (D, R) and V (O, R) of an adapter, whole where processes hold parts of them."""
        experts = self.experts_of(adapter_name)
        return experts.modes(self.dispatcher.whole)

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Run the base layer alone."""
        before, self._disable_adapters = self._disable_adapters, True
        try:
            yield
        finally:
            self._disable_adapters = before

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Refused, unless `tucka.export.merge` has done it: the update depends on the route of each forward."""
        if self.merged:
            return
        raise ValueError(
            f"layer {self.name!r} cannot be merged: its update depends on the route of each forward. "
            "Call merge_and_unload(route=...) on the model"
        )

    def unmerge(self) -> None:
        """Nothing stays merged: a model whose weights were merged has no such layers any more."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's experts and router."""
        super().delete_adapter(adapter_name)
        self.dispatcher.router_owners.pop(adapter_name, None)

    def __repr__(self) -> str:
        return "tucka." + super().__repr__()
