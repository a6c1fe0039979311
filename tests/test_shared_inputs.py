"""`share_inputs`: layers that read one tensor take one adapted input."""

import pytest
import torch
from conftest import adapted, adapter_state, batch_for, build, plain_config, randomise
from peft import PeftModel
from torch import nn

import tucka
from tucka.model import layers_of

SHARED = {
    "bert": (["query", "key", "value"], 2, 6),
    "llama": (["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], 6, 12),
    "bart": (["q_proj", "k_proj", "v_proj"], 6, 18),
    "t5": (["q", "k", "v"], 6, 18),
}


def shared(name, **fields):
    targets, owners, layers = SHARED[name]
    model = adapted(name, target_modules=targets, share_inputs=True, **fields)
    held = [layer for layer in layers_of(model) if "default" in layer.tucka_experts]
    assert (len(held), len(layers_of(model))) == (owners, layers)
    return randomise(model)


def tie_by_hand(model, name):
    """A model without sharing whose layers hold the same values as the one with it."""
    targets = SHARED[name][0]
    separate = adapted(name, target_modules=targets).eval()
    held = {layer.name: layer for layer in layers_of(model)}
    with torch.no_grad():
        for layer in layers_of(separate):
            for one, other in zip(
                layer.tucka_experts["default"].parameters(), held[layer.name].experts_of("default").parameters()
            ):
                one.copy_(other)
            if "default" in layer.tucka_router:
                layer.tucka_router["default"].load_state_dict(held[layer.name].tucka_router["default"].state_dict())
    return separate


@pytest.mark.parametrize("name", list(SHARED))
def test_as_layers_with_equal_experts(name):
    """Cross-attention reads two tensors: its query adapts one, its key and value the other."""
    model = shared(name).eval()
    separate, batch = tie_by_hand(model, name).double(), batch_for(name)
    model.double()
    torch.testing.assert_close(model(**batch).logits, separate(**batch).logits)
    gradients = {}
    for one in (model, separate):
        one(**batch).loss.backward()
    for layer in layers_of(separate):
        owner = {other.name: other for other in layers_of(model)}[layer.name].experts_of("default")
        gradients.setdefault(owner, []).append(layer.tucka_experts["default"].core.grad)
    for owner, parts in gradients.items():
        torch.testing.assert_close(owner.core.grad, sum(parts))


def test_one_adapted_input_is_computed_for_three(monkeypatch):
    model = shared("bert").eval()
    calls = []
    for layer in layers_of(model):
        updates = layer._updates
        monkeypatch.setattr(
            layer, "_updates", lambda *args, f=updates, n=layer.name, **named: calls.append(n) or f(*args, **named)
        )
    model(**batch_for("bert"))
    assert [name.rpartition(".")[2] for name in calls] == ["query", "query"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    model, batch = shared("llama"), batch_for("llama")

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), plain)


def test_saved_once_and_reloaded(tmp_path):
    model = shared("bert").eval()
    state = adapter_state(model)
    assert len([key for key in state if key.endswith("core")]) == 4  # core and shared_core of two layers
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    torch.testing.assert_close(again(**batch_for("bert")).logits, model(**batch_for("bert")).logits)
    model.delete_adapter("default")
    assert not any(layer.tucka_input_of for layer in layers_of(model))


def test_a_second_adapter_of_its_own():
    """Two adapters, one that shares inputs and one that does not, add their updates."""
    model = shared("bert").eval()
    model.add_adapter("second", plain_config(r=2, target_modules=["query", "key", "value"], init_router="kaiming"))
    alone = model(**batch_for("bert")).logits
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(**batch_for("bert")).logits, alone)  # the second starts at the identity


def test_the_start_hears_all_readers():
    """The tensor that the experts start from is that of the sum of what the readers send back."""

    class Readers(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return self.q(x) + self.k(x)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            readers = Readers()
            self.q = nn.Linear(6, 6, bias=False)
            self.q.weight = nn.Parameter(readers.q.weight + readers.k.weight)

        def forward(self, x):
            return self.q(x)

    fields = dict(r=2, k=1, t=1, p=1, init_router="kmeans", affinity="cosine", init_experts="gradient",
                  normalize="bounded")  # fmt: skip
    batches = [torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(1))]
    options = dict(calibration=batches, loss=lambda out, batch: out.square().mean(), progress=False)
    both = tucka.apply(Readers(), plain_config(**fields, target_modules=["q", "k"], share_inputs=True), **options)
    one = tucka.apply(Sum(), plain_config(**fields, target_modules=["q"]), **options)
    (first, second) = (layers_of(model)[0].tucka_experts["default"].input_factor for model in (both, one))
    torch.testing.assert_close(first @ torch.linalg.pinv(first), second @ torch.linalg.pinv(second), atol=1e-4, rtol=0)


def test_an_additive_adapter_has_no_input_to_share():
    with pytest.raises(ValueError, match="share_inputs=True shares an adapted input, which form='additive' has not"):
        tucka.TuckAConfig(share_inputs=True, form="additive")


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_exported_for_every_reader(name, tmp_path):
    """A LoRA knows of no shared inputs: each reader gets its own."""
    model, batch = shared(name).eval(), batch_for(name)
    route = tucka.Route(torch.tensor([1]), torch.tensor([[0.6, 0.3]]))
    tucka.to_lora(model, tmp_path / "lora", route=route)
    with tucka.pin_route(model, route):
        expected = model(**batch).logits
    found = PeftModel.from_pretrained(build(name), tmp_path / "lora").eval()(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
