"""One call from a pretrained model to an adapted one."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from peft import PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from .calibration import Loss
from .config import TuckAConfig
from .initialization import initialize
from .layer import linear_features
from .targets import DEFAULT_TARGETS

TASK_OF_CLASS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
}
"""PEFT's task by the end of a model's class name; the first three train the model's head as well."""

HEAD_OF_CLASS = {"ForImageClassification": "classifier", "ForAudioClassification": "classifier"}
"""Heads to train where PEFT knows no task."""


def apply(
    model: nn.Module,
    config: TuckAConfig | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    calibration_samples: int = 512,
    loss: Loss | None = None,
    progress: bool = True,
    adapter_name: str = "default",
) -> PeftModel:
    """Adapt a pretrained model with Tucker experts.

    Parameters
    ----------
    model : Module
        Usually a transformers model; it is adapted in place, as PEFT does.
    config : TuckAConfig, optional
        Default: `default_config(model)`.
    calibration : iterable, optional
        Batches the model takes, to start router and experts from data: see `tucka.initialize`. Without it the router
        starts from the first training batch, in place, and the experts without data.
    calibration_samples : int
        How many samples of it to read.
    loss : callable, optional
        Loss of an output and its batch, for ``init_experts="gradient"``; default: ``output.loss``.
    progress : bool
        Show a progress bar while calibrating.
    adapter_name : str
        Name of the adapter.

    Returns
    -------
    peft.PeftModel
        Before the first step its outputs equal the base model's, unless `config` says otherwise.

    Raises
    ------
    ValueError
        If the model is wrapped already, or `config` does not fit it; the model is then left as it was.

    Examples
    --------
    >>> model = tucka.apply(AutoModelForCausalLM.from_pretrained(name))  # doctest: +SKIP
    """
    if isinstance(model, PeftModel):
        raise ValueError("the model is wrapped already; add another adapter with model.add_adapter(name, config)")
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = get_peft_model(model, default_config(model) if config is None else config, adapter_name)
    if calibration is not None:
        try:
            initialize(adapted, calibration, adapter_name, samples=calibration_samples, loss=loss, progress=progress)
        except BaseException:
            adapted.unload()
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            raise
    return adapted


def default_config(model: nn.Module) -> TuckAConfig:
    """The configuration `apply` uses when given none.

    Targets follow the architecture, or are all linear layers of one that is not known; the rank is the default, or less
    for layers narrower than that; the head of a classification model is trained beside the adapter.
    """
    name = type(model).__name__
    known = isinstance(model, PreTrainedModel) and model.config.model_type in DEFAULT_TARGETS
    task = next((task for end, task in TASK_OF_CLASS.items() if name.endswith(end)), None)
    head = next((head for end, head in HEAD_OF_CLASS.items() if name.endswith(end)), None)
    config = TuckAConfig(
        task_type=task,
        target_modules=None if known else "all-linear",
        modules_to_save=[head] if head else None,
    )
    widest = min([config.r, *_adapted_widths(model, copy.copy(config))])
    config.r = widest - widest % config.block_width(widest)
    return config


def _adapted_widths(model: nn.Module, config: TuckAConfig) -> list[int]:
    """The narrower side of every layer that a configuration adapts; heads that are trained whole are none of them."""
    if isinstance(model, PreTrainedModel):
        config.target_modules = config.target_modules or DEFAULT_TARGETS[model.config.model_type]
    _maybe_include_all_linear_layers(config, model)
    heads = {*(config.modules_to_save or ()), *SEQ_CLS_HEAD_NAMES}
    targets = [
        module
        for name, module in model.named_modules()
        if check_target_module_exists(config, name) and heads.isdisjoint(name.split("."))
    ]
    return [min(features) for features in map(linear_features, targets) if features is not None]
