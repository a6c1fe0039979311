"""Models to examine, and what an examination must leave as it was."""

import random

import numpy as np
import torch
from conftest import batch_for, batches_for, build, plain_config

import tucka
from tucka.diagnosis import CHECKS
from tucka.diagnosis.examination import _run
from tucka.diagnosis.subject import Subject

GENERATING = ("gpt2", "llama", "t5")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func", "_active_adapter", "_disable_adapters")


def fresh(name="bert", samples=24, **fields):
    """A model as `apply` leaves it, before its first step."""
    config = plain_config(**{"r": 4, "k": 2, "affinity": "cosine", "init_router": "kmeans", **fields})
    return tucka.apply(build(name), config, calibration=batches_for(name, samples), progress=False)


def check(name, model, batch=None):
    """Run one check as `doctor` does."""
    subject = Subject.of(model, batch_for("bert", 4) if batch is None else batch, None)
    return _run(CHECKS[name], subject)


def assert_found(row, outcome, why, remedy):
    assert row.outcome == outcome, row
    assert why in row.why and remedy in row.remedy, row


def raw(value):
    return None if value is None else value.detach().view(torch.uint8).numpy().tobytes() if value.ndim else value.item()


def digest(model):
    """All of a model, and of the random state, that an examination could change."""
    held = [*model.named_parameters(), *model.named_buffers()]
    return dict(
        modules=[(name, id(module), module.training) for name, module in model.named_modules()],
        values=[(name, id(value), value.requires_grad, raw(value)) for name, value in held],
        gradients=[(name, id(value.grad), raw(value.grad)) for name, value in model.named_parameters()],
        hooks=[[list(getattr(module, kind)) for kind in HOOKS] for module in model.modules()],
        switches=[[str(getattr(module, name, None)) for name in SWITCHES] for module in model.modules()],
        adapters=[str(model.active_adapters), str(model.base_model.active_adapter)],
        configs={name: str(vars(config)) for name, config in model.peft_config.items()},
        base=str(model.get_base_model().config),
        generation=str(vars(model.get_base_model()).get("generation_config")),
        targeted=str(model.base_model.targeted_module_names),
        waiting=[module.awaits_start for module in model.modules() if isinstance(module, tucka.routing.Router)],
        random=(torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
    )
