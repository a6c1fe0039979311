"""Tiny models with an adapter, for tests of what users of Hugging Face PEFT expect of any method."""

import peft
import torch
from conftest import (
    adapted,
    assert_same_tensors,
    batch_for,
    build,
    first_output,
    plain_config,
    stored,
)
from peft import PeftModel

QUERY, VALUE = "attention.self.query", "attention.self.value"

QUERY_VALUE = ["query", "value"]
SIZES = dict(r=4, k=3, t=2, p=2)

PARAMETERS = 4 * (32 * 4 + 3 * 2 * 4 * 4 + 2 * 2 + 4 * 4) + 3 * 2 * 2 * 32
"""In each of four layers D·R + K·P·R² + T·P + R² (the always-active slice); once K·T·2D (mean and deviation)."""


def bert_config(**fields):
    return plain_config(**{**SIZES, "target_modules": QUERY_VALUE, **fields})


def bert(**fields):
    """A tiny BERT with a started and randomised adapter on its queries and values, each time the same."""
    torch.manual_seed(0)
    return adapted("bert", **{**SIZES, "target_modules": QUERY_VALUE, **fields}).eval()


def outputs(model, batch=None):
    with torch.no_grad():
        return first_output(model(**(batch_for("bert") if batch is None else batch)))


def reloaded(model, directory, **options):
    """The adapter, saved and loaded on a fresh copy of its base; checked to be the same."""
    model.eval().save_pretrained(directory)
    again = PeftModel.from_pretrained(build("bert"), directory, **options).eval()
    assert_same_tensors(stored(again), stored(model))
    assert torch.equal(outputs(again), outputs(model))
    return again


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_layers(model):
    """Names of the adapted layers, as PEFT tells them."""
    return {status.name.removeprefix("model.") for status in peft.get_layer_status(model)}


def layers(*kinds, indices=(0, 1)):
    return {f"bert.encoder.layer.{index}.{kind}" for index in indices for kind in kinds}
