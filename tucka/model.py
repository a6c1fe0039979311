"""Injection of Tucker experts into a model, on PEFT's engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .dispatch import Dispatcher
from .fitting import require_fitting_file, require_own_weights, require_room, require_task, saved_modules
from .generation import keep_prompt_routes, release_prompt_routes
from .lasso import add_penalty, remove_penalty
from .layer import TuckALayer
from .packing import keep_layout
from .patterns import require_quick_matching
from .plan import LayerPlan, plan_adapter
from .state import adapted_names_in, modernise_targets, read_published_weights, require_whole_adapter
from .targets import DEFAULT_TARGETS
from .towers import Attachment, Tower

FACTOR_NAMES = ("expert_factor", "input_factor", "output_factor", "held_input", "held_output")
TENSOR_NAMES = ("core", "shared_core", "axis_core", *FACTOR_NAMES)
LASSO_NAMES = ("lasso_expert", "lasso_input", "lasso_output")
ROUTER_NAMES = ("centroids", "initialised", "balance_bias", "center", "scale", "axes", "spread", "log_share")
RESERVED_NAMES = frozenset([*TENSOR_NAMES, *LASSO_NAMES, *ROUTER_NAMES])
"""PEFT tells adapters apart by the ends of keys, so a tensor's own name is none for an adapter."""


class TuckAModel(BaseTuner):
    """A model with Tucker experts; `peft.PeftModel` wraps it, and users rarely meet it.

    Parameters
    ----------
    model : Module
        The model to adapt, in place.
    peft_config : TuckAConfig or dict
        The configuration, or {adapter name: configuration}.
    adapter_name : str
    low_cpu_mem_usage : bool
        Create the adapter's parameters on the meta device, to be loaded later.
    state_dict : dict, optional
        Adapt the layers whose keys it holds instead of the configured ones.
    """

    prefix = "tucka_"
    tuner_layer_cls = TuckALayer
    target_module_mapping = DEFAULT_TARGETS

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Optional[dict[str, Tensor]] = None,
    ) -> None:
        """Add an adapter. All that can be refused is refused before the model is touched."""
        if adapter_name in RESERVED_NAMES:
            raise ValueError(f"an adapter cannot be called {adapter_name!r}: its tensors are called that in files")
        given: Any = self.peft_config[adapter_name]
        config: Any = self._prepare_adapter_config(given, self.get_model_config(model))
        require_task(model, config)
        require_quick_matching(config, [name for name, _ in model.named_modules()])
        if config.from_published_code:
            modernise_targets(config, model)
        names = None if state_dict is None else adapted_names_in(state_dict, self.prefix)
        plans = plan_adapter(self, model, config, names)
        require_room(model, config, plans)
        require_fitting_file(model, config, plans, saved_modules(model, config, plans, adapter_name))
        self._plans: dict[str, LayerPlan] = plans
        borrowed = {name: plan.factors_of for name, plan in plans.items() if plan.factors_of is not None}
        given.factor_owners = borrowed or None
        self._injected_into = model
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        finally:
            del self._plans, self._injected_into
        keep_layout(model)
        keep_prompt_routes(model, dispatchers_of)
        if config.lasso:
            add_penalty(model, layers_of)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        plan = self._plans[current_key]
        layer = target
        if not isinstance(layer, TuckALayer):
            layer = TuckALayer(target, current_key, self._dispatcher(plan.tower))
            self._attach(layer, plan.tower)
        factors_of = None
        if plan.factors_of is not None:
            owner: Any = self._injected_into.get_submodule(plan.factors_of)
            factors_of = owner.tucka_experts[adapter_name]
        lender: Any = self._injected_into.get_submodule(plan.input_of) if plan.input_of else None
        layer.update_layer(
            adapter_name,
            peft_config,
            plan.rank,
            factors_of=factors_of,
            input_of=lender,
            routed=plan.routed,
            routes=plan.routes,
            router_sources=plan.router_sources,
        )
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _dispatcher(self, tower: Tower) -> Dispatcher:
        model = self._injected_into
        known = dispatchers_of(model).get(tower.name)
        return known or Dispatcher(tower.name, model.get_submodule(tower.encoder) if tower.encoder else None)

    def _attach(self, layer: TuckALayer, tower: Tower) -> None:
        """Hook a new dispatcher to its tower; a layer outside all towers is its own."""
        if layer.dispatcher.attachment is None:
            root = layer if tower.name == layer.name else self._injected_into.get_submodule(tower.name)
            layer.dispatcher.attachment = Attachment(layer.dispatcher, root)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Adapters are made in single precision; who asks for the base model's precision gets that.
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for module in self.model.modules():
            if isinstance(module, TuckALayer):
                module._move_adapter_to_device_of_base_layer(adapter_name)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Optional[list[str]] = None,
        *,
        route: Any = None,
        loader: Optional[Iterable[Any]] = None,
    ) -> nn.Module:
        """Fold a fixed route into the base weights and give the base model back; see `tucka.export.merge`.

        Raises
        ------
        ValueError
            If no route is given and it depends on data, or it cannot be merged. The model is then as it was.
        """
        from .export import merge

        if adapter_names is not None and len(adapter_names) != 1:
            raise ValueError(f"one adapter is merged at a fixed route, but adapter_names={adapter_names}")
        name = adapter_names[0] if adapter_names else None
        merged, _ = merge(self, route, loader, adapter_name=name, safe_merge=safe_merge, progressbar=progressbar)
        return merged

    def _check_merge_allowed(self) -> None:
        if not all(layer.merged for layer in layers_of(self.model)):
            raise ValueError(
                "Tucker experts cannot be merged in place: the update depends on the route of each forward. Call "
                "merge_and_unload(route=...), or keep the adapter"
            )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        dispatchers = dispatchers_of(self.model).values()
        super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for dispatcher in dispatchers:
            dispatcher.attachment.remove()
        release_prompt_routes(self.model)
        remove_penalty(self.model)
        return self.model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, TuckALayer):  # the base layer comes back as it is; quantised ones may have no `weight`
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = read_published_weights(model, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        require_whole_adapter(model, adapter_name, remapped)
        require_own_weights(model, config, adapter_name, remapped)
        return remapped


def layers_of(model: nn.Module) -> list[TuckALayer]:
    """The adapted layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, TuckALayer)]


def dispatchers_of(model: nn.Module, adapter_name: str | None = None) -> dict[str, Dispatcher]:
    """The dispatchers of a model by tower name; of an adapter, those that have a router of it."""
    found = {layer.dispatcher.name: layer.dispatcher for layer in layers_of(model)}
    return {tower: d for tower, d in found.items() if adapter_name is None or adapter_name in d.router_owners}


def single_adapter_name(model: nn.Module, adapter_name: str | None) -> str:
    """The adapter asked for, or the active one.

    Raises
    ------
    ValueError
        If the model has no Tucker experts, no such adapter, or several active ones to choose from.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError("the model has no Tucker experts; wrap it with tucka.apply first")
    known = sorted({name for layer in layers for name in layer.tucka_experts})
    active = layers[0].active_adapters if adapter_name is None else [adapter_name]
    if len(active) != 1 or active[0] not in known:
        raise ValueError(f"adapter {', '.join(map(repr, active)) or 'None'} is not one of {known}; name one of them")
    return active[0]
