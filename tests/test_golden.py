"""The paper preset against tensors recorded from the paper's published implementation (tests/data/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import tucka

GOLDEN = Path(__file__).parent / "data" / "golden"
NAMES = ["bert_r4_k3_t2_p2", "gpt2_conv1d_r3_k2_t3_p2", "vit_r2_k5_t2_p2"]
PARTS = {"core": "G", "input_factor": "U", "expert_factor": "C"}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


class Golden:
    """One recorded model: its metadata, its tensors, and the adapted model at the recorded start."""

    def __init__(self, name):
        self.meta = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.adapter = GOLDEN / f"{name}_official_adapter"
        self.base_directory = GOLDEN / f"{name}_base"
        self.inputs = {key[3:]: value for key, value in self.tensors.items() if key.startswith("in.")}

    def base(self):
        # Not "eager": transformers 5 takes the softmax of its eager attention in single precision.
        model = getattr(transformers, self.meta["model_class"]).from_pretrained(
            self.base_directory, dtype=torch.float64
        )
        return model.eval()

    def loaded(self, trainable=False):
        return PeftModel.from_pretrained(self.base(), self.adapter, is_trainable=trainable)

    def recorded(self, kind, model):
        """{parameter of the model: recorded tensor} for one kind of record (init, grad, after_sgd)."""
        found = {}
        for new, old in zip(tucka.model.layers_of(model), self.meta["layers"]):
            for part, letter in PARTS.items():
                found[getattr(new.tucka_experts["default"], part)] = self.tensors[f"{kind}.{old}.{letter}"]
            for router in new.tucka_router.values():
                found[router.centroids] = self.tensors[f"{kind}.router.centroids"]
        return found

    def loss(self, logits):
        return (
            10 * (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).mean()
            + (logits**2).mean()
        )


@pytest.fixture(params=NAMES)
def golden(request):
    return Golden(request.param)


def test_official_adapter_gives_recorded_outputs_twice(golden):
    model = golden.loaded()
    for _ in range(2):
        with tucka.record_routes(model) as routes, torch.no_grad():
            logits = model(**golden.inputs).logits
        close(logits, golden.tensors["out.logits"])
        assert torch.equal(routes[0].group, golden.tensors["out.group"])
        close(routes[0].gates[0], golden.tensors["out.gates"])


def test_official_parameters_are_all_read(golden):
    model = golden.loaded()
    recorded = golden.recorded("init", model)
    assert len(recorded) == 3 * len(golden.meta["layers"]) + 1
    assert all(torch.equal(parameter, expected) for parameter, expected in recorded.items())


def test_gradients_and_sgd_steps(golden):
    model = golden.loaded(trainable=True).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=golden.meta["sgd_lr"])
    for step in range(golden.meta["steps"]):
        optimiser.zero_grad()
        loss = golden.loss(model(**golden.inputs).logits)
        close(loss, torch.tensor(golden.meta["losses"][step], dtype=torch.float64))
        loss.backward()
        if step == 0:
            for parameter, expected in golden.recorded("grad", model).items():
                close(parameter.grad, expected)
        optimiser.step()
    for parameter, expected in golden.recorded("after_sgd", model).items():
        close(parameter, expected)
    close(model.eval()(**golden.inputs).logits, golden.tensors["out.logits_after_sgd"])


def test_paper_preset_is_the_official_method(golden):
    """The preset, given the recorded start by hand, reproduces what the official file does."""
    hyper = golden.meta["hyper"]
    published = golden.loaded()
    targets = [layer.name for layer in tucka.model.layers_of(published)]
    config = tucka.TuckAConfig.paper(**hyper, target_modules=targets)
    model = tucka.apply(golden.base(), config)
    with torch.no_grad():
        for parameter, value in golden.recorded("init", model).items():
            parameter.copy_(value)
    for router in (layer.tucka_router for layer in tucka.model.layers_of(model)):
        for one in router.values():
            one.awaits_start = False
    close(model.eval()(**golden.inputs).logits, golden.tensors["out.logits"])


def test_resaved_official_adapter_is_ours_and_the_same(golden, tmp_path):
    published = golden.loaded()
    published.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert not any(key.endswith(("tucka_g", "tucka_ec")) for key in keys)
    again = PeftModel.from_pretrained(golden.base(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**golden.inputs).logits, published(**golden.inputs).logits)
