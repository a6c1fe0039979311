"""Default targets name layers that transformers' models really have."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tucka.layer import linear_features
from tucka.targets import DEFAULT_TARGETS


@pytest.mark.parametrize("architecture", DEFAULT_TARGETS)
def test_every_default_target_is_a_linear_layer_of_its_architecture(architecture):
    config = AutoConfig.for_model(architecture)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    found = {}
    for name, module in model.named_modules():
        found.setdefault(name.rpartition(".")[2], []).append(module)
    for target in DEFAULT_TARGETS[architecture]:
        assert target in found, f"{architecture} has no {target}"
        assert all(linear_features(module) for module in found[target])
