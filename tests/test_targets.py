"""Default targets name layers that transformers' models really have."""

import pytest
import torch
from conftest import ARCHITECTURES, build
from transformers import AutoConfig, AutoModel

import tucka
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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_rank_goes_by_the_layers_adapted(name):
    """A head of two classes is trained whole, and makes no rank of two."""
    rank = min(tucka.TuckAConfig.r, 16 if name == "llama" else 32)  # its keys and values have 16 features
    assert tucka.apply(build(name)).peft_config["default"].r == rank


def test_the_default_rank_fits_the_narrowest_layer():
    narrow = torch.nn.Sequential(torch.nn.Linear(9, 4), torch.nn.Linear(4, 9))
    assert tucka.apply(narrow).peft_config["default"].r == 4
