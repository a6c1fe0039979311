"""Counts of what an adapter trains, each against the closed form."""

from conftest import build

import tucka
from analysis.adapters import adapter_of
from analysis.parameters import count, layer_shapes
from analysis.report.accounting import trained_parameters
from tucka.ranks import adapter_parameters


def assert_counts_are_closed(config):
    """Every count on a tiny BERT is that of the closed form; returns the adapted model."""
    expected = count(layer_shapes(build("bert"), config.target_modules), "tucka", config=config).total
    model = tucka.apply(build("bert"), config)
    trained = sum(value.numel() for name, value in model.named_parameters() if ".tucka_" in name)
    assert trained == adapter_parameters(model) == expected
    assert trained_parameters(adapter_of(model)).parameters.sum() == expected
    return model
