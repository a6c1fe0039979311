"""Whether an adapter fits a model, found before the model is touched.

`require_room` bounds what an adapter allocates, `saved_modules` what it copies of the model, and `require_fitting_file`
compares the file that a configuration was read beside with the model it is to be loaded into.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layer import TuckALayer, linear_features
from .state import base_model, published_name
from .weights import (
    FILE_PREFIX,
    PUBLISHED_KEYS,
    ROOM,
    Shape,
    expert_shapes,
    is_own,
    layer_of,
    require_sound,
    router_shapes,
)

if TYPE_CHECKING:
    from .config import TuckAConfig
    from .plan import LayerPlan

TIMES = 16
"""How many times larger than its model an adapter may be."""

GENERATING = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
"""Tasks for which PEFT wraps the model's generation, after it has wrapped its layers."""

HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Ends of the names of modules that PEFT saves whole for a task when it wraps a model, as in its `PeftModelFor…`."""

CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
"""Modules that are not called, of which PEFT therefore saves none."""


def require_room(model: nn.Module, config: TuckAConfig, plans: dict[str, LayerPlan]) -> None:
    """Refuse an adapter that is far larger than the layers it adapts, before it is allocated.

    Raises
    ------
    ValueError
        If it would hold more than `TIMES` the weights of those layers, and more than `tucka.weights.ROOM`.
    """
    shapes = expected_shapes(model, config, plans).values()
    numbers = config.k**2 + sum(math.prod(shape) for shape in shapes)  # K²: the identity of the groups' mode is formed
    weights = sum(math.prod(_features(model, name)) for name in plans)  # from widths: weights may be packed or sharded
    if numbers > max(ROOM, TIMES * weights):
        raise ValueError(
            f"an adapter of r={config.r}, k={config.k}, t={config.t}, p={config.p} needs {numbers} numbers, but the "
            f"{len(plans)} layers it adapts have {weights} weights, and it may have {TIMES} times as many"
        )


def require_task(model: nn.Module, config: TuckAConfig) -> None:
    """Refuse a task that the model is not made for, where PEFT would fail half way; `ValueError` names both."""
    if config.task_type in GENERATING and "prepare_inputs_for_generation" not in dir(model):
        raise ValueError(f"task_type={str(config.task_type)!r} generates, but a {type(model).__name__} does not")


# --- modules saved whole -----------------------------------------------------------------------------------------


def saved_modules(
    model: nn.Module, config: TuckAConfig, plans: dict[str, LayerPlan], adapter_name: str
) -> dict[str, nn.Module]:
    """The modules that an adapter saves whole, by name: those whose name ends in one of `modules_to_save`, as in PEFT.

    Raises
    ------
    ValueError
        If one is a container, holds an adapted layer or lies within one.
    """
    ends = tuple(config.modules_to_save or ())
    found: dict[str, nn.Module] = {}
    for name, module in _original_modules(model).items():
        if not name.endswith(ends):
            continue
        if isinstance(module, CONTAINERS):
            raise ValueError(f"modules_to_save={list(ends)} names {name!r}, but no {type(module).__name__} is called")
        adapted = next((layer for layer in plans if f"{layer}.".startswith(f"{name}.")), None)
        if adapted:
            raise ValueError(f"modules_to_save={list(ends)} names {name!r}, but {adapted!r} in it is adapted")
        found[name] = module
    inside = ("base_layer", "tucka_experts", "tucka_router", f"tucka_experts.{adapter_name}")
    reached = [part for layer in plans for part in inside if f"{layer}.{part}".endswith(ends)]
    if reached:
        raise ValueError(f"modules_to_save={list(ends)} reaches into adapted layers ({reached[0]!r})")
    return found


def _original_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model without what adapters have put into it; the original of what they have wrapped."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or name.startswith(inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (f"{name}.",)
        found[name] = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
    return found


# --- the file beside the configuration -----------------------------------------------------------------------------


def require_fitting_file(
    model: nn.Module, config: TuckAConfig, plans: dict[str, LayerPlan], saved: dict[str, nn.Module]
) -> None:
    """Compare what the weights beside a configuration declare with the model that an adapter is loaded into.

    Only for configurations that were read from files and are loaded for inference: another may be the start of a new
    adapter. Where the model has none of the file's layers, they may be renamed on loading (``key_mapping``): nothing is
    compared here, and loading compares again.

    Raises
    ------
    ValueError
        If there are no weights, one of the adapter's tensors is missing or has another shape, or one is of no use,
        such as a weight of the base model.
    """
    declared = config.weights_beside
    if declared is None or not config.inference_mode:
        return
    if not declared:
        raise ValueError("there is no adapter_model.safetensors beside the configuration of the adapter")
    expected = expected_shapes(model, config, plans)
    found = _renamed(model, config, plans, {key: entry.shape for key, entry in declared.items()})
    if {name for name, _ in model.named_modules()}.isdisjoint(map(layer_of, found)):
        return
    for name, module in (saved | _heads(model, config)).items():
        expected |= {f"{FILE_PREFIX}{name}.{key}": tuple(value.shape) for key, value in module.state_dict().items()}
    missing = [key for key in expected if key not in found]
    if missing:
        raise ValueError(f"the adapter file lacks {len(missing)} of {len(expected)} tensors, {missing[0]} among them")
    trained = trained_beside(model, config, plans)
    expected |= {key: trained[name] for key in found for name in plain_names(key) if name in trained}
    unknown = [key for key in found if key not in expected]
    if unknown:
        raise ValueError(
            f"the adapter file holds {len(unknown)} tensors the model has no place for, as {unknown[0]}; an adapter "
            "replaces no weights of its base model but those that modules_to_save or bias name"
        )
    for key, shape in found.items():
        if shape != expected[key]:
            raise ValueError(f"{key} has shape {shape} in the adapter file, {expected[key]} in the model")


def _heads(model: nn.Module, config: TuckAConfig) -> dict[str, nn.Module]:
    """The modules that PEFT will save whole for the task when it wraps the model; a wrapped one has them already."""
    modules = _original_modules(model)
    if any(isinstance(module, BaseTunerLayer) for module in modules.values()):
        return {}
    ends = next((ends for task, ends in HEADS.items() if task == config.task_type), ())
    return {name: module for name, module in modules.items() if name.endswith(ends)}


def require_own_weights(
    model: nn.Module, config: TuckAConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Refuse weights of the base model in a state dict that is about to be copied, and values that are not sound.

    Raises
    ------
    ValueError
        Naming the first key at fault.
    """
    base = base_model(model)
    adapted = {name for name, module in base.named_modules() if isinstance(module, TuckALayer)}
    trained, present = trained_beside(base, config, adapted), base.state_dict()
    others = [key for key in state_dict if not is_own(key) and f".modules_to_save.{adapter_name}." not in key]
    beside = [key for key in others if key.removeprefix(FILE_PREFIX) in present]
    replaced = [key for key in beside if not any(name in trained for name in plain_names(key))]
    if replaced:
        raise ValueError(
            f"the adapter file holds {len(replaced)} weights of the base model, as {replaced[0]}; an adapter replaces "
            "none but those that modules_to_save or bias name"
        )
    for key, value in state_dict.items():
        if type(value) is Tensor and value.is_floating_point() and not value.is_meta:  # whole, and not a shard
            require_sound(key, value)
    embeddings = [key for key in beside if not key.endswith(".bias")]
    if embeddings:
        warnings.warn(f"the adapter file replaces embeddings of the base model: {', '.join(embeddings)}", stacklevel=2)


def expected_shapes(model: nn.Module, config: TuckAConfig, plans: dict[str, LayerPlan]) -> dict[str, Shape]:
    """Every tensor of an adapter, as its file names it, and its shape."""
    found: dict[str, Shape] = {}
    for name, plan in plans.items():
        d, o = _features(model, name)
        experts = expert_shapes(config, plan.rank, d, o, routed=plan.routed)
        router = router_shapes(config, d) if plan.routes else {}
        found |= {f"{FILE_PREFIX}{name}.tucka_experts.{part}": experts[part] for part in _parts(config, plan)}
        found |= {f"{FILE_PREFIX}{name}.tucka_router.{part}": router[part] for part in _router_parts(config) if router}
    return found


def _features(model: nn.Module, name: str) -> tuple[int, int]:
    """(D, O) of a layer that is planned or adapted."""
    module = model.get_submodule(name)
    return linear_features(module.get_base_layer() if isinstance(module, TuckALayer) else module) or (0, 0)


def _parts(config: TuckAConfig, plan: LayerPlan) -> list[str]:
    """Names of the tensors that the experts of a layer have; one that takes another's adapted input has none."""
    if plan.input_of is not None:
        return []
    tied = config.tie_factors and config.form == "multiplicative"
    owns, holds = plan.factors_of is None, config.trained(plan.rank) < plan.rank
    present = dict(
        core=True,
        expert_factor=True,
        input_factor=owns,
        output_factor=owns and not tied,
        held_input=owns and holds,
        held_output=owns and holds and not tied,
        shared_core=config.shared_expert and plan.routed,
        axis_core=config.axis_block_size is not None,
        lasso_expert=config.lasso > 0,
        lasso_input=config.lasso > 0,
        lasso_output=config.lasso > 0 and not tied,
    )
    return [part for part, there in present.items() if there]


def _router_parts(config: TuckAConfig) -> list[str]:
    """Names of the tensors that a router has."""
    centred = config.affinity != "paper"
    biased = config.balance_bias or config.init_router == "kmeans_balanced"
    present = dict(
        center=centred, scale=centred and not config.whitens, axes=config.whitens, spread=centred,
        balance_bias=biased, log_share=config.expert_shares,
    )  # fmt: skip
    return ["centroids", "initialised", *(part for part, there in present.items() if there)]


def _renamed(
    model: nn.Module, config: TuckAConfig, plans: dict[str, LayerPlan], shapes: dict[str, Shape]
) -> dict[str, Shape]:
    """The same shapes by the keys of today, where the paper's published code wrote them; see `tucka.state`."""
    if not any(key.rpartition(".")[2] in PUBLISHED_KEYS for key in shapes):
        return shapes
    layers = {published_name(model, name): name for name in plans}
    router = next((name for name, plan in plans.items() if plan.routes), "")
    found: dict[str, Shape] = {}
    for key, shape in shapes.items():
        ours, name = PUBLISHED_KEYS.get(key.rpartition(".")[2]), layers.get(layer_of(key))
        if ours is None or name is None:
            found[key] = shape
        elif ours.endswith(".centroids"):  # the router may be held by a layer beside that in the file
            found |= {f"{FILE_PREFIX}{router}.{ours}": shape, f"{FILE_PREFIX}{router}.tucka_router.initialised": ()}
        else:
            found[f"{FILE_PREFIX}{name}.{ours}"] = shape
    return found


def trained_beside(model: nn.Module, config: TuckAConfig, adapted: Collection[str]) -> dict[str, Shape]:
    """Weights of the base model that the file of an adapter may hold: biases, if it trains them, and embeddings.

    PEFT saves the embeddings of a model whose vocabulary was resized, and loads them into the model itself.
    """
    modules = embeddings_of(model)
    embeddings = {f"{name}." for name, module in model.named_modules() if any(module is each for each in modules)}
    found: dict[str, Shape] = {}
    for key, value in model.named_parameters(remove_duplicate=False):
        (name, *_) = plain_names(key)
        layer, _, end = name.rpartition(".")
        bias = end == "bias" and (config.bias == "all" or (config.bias == "tucka_only" and layer in adapted))
        if not is_own(key) and (bias or name.startswith(tuple(embeddings))):
            found[name] = tuple(value.shape)
    return found


def plain_names(key: str) -> list[str]:
    """Names that a key of a file can have in a base model without adapters.

    PEFT saves biases and embeddings once for each place in its wrappers, and an adapter's name may stand among these.
    """
    name = key.removeprefix(FILE_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
    module, _, rest = name.partition(".modules_to_save.")
    return [name] if not rest else [f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"]


def embeddings_of(model: nn.Module) -> list[nn.Module]:
    """The input and output embeddings of a transformers model."""
    found: list[nn.Module] = []
    if isinstance(model, PreTrainedModel):
        for get in (model.get_input_embeddings, model.get_output_embeddings):
            with suppress(NotImplementedError, AttributeError):
                found.append(get())
    return [module for module in found if module is not None]
