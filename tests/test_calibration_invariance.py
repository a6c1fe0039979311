"""What must not change a calibrated start: padding, precision, checkpointing, where the loss comes from."""

import pytest
import torch
from conftest import adapter_state, assert_same_state, batches_for, build, router_of, started, unstarted
from peft import PeftModel

import tucka
from tucka.model import layers_of

WARM = dict(warm_start=0.5)  # so that the cores are compared too, and not the spaces of the factors alone


def test_a_loss_of_ones_own():
    batches, seen = batches_for("bert"), []

    def loss(output, batch):
        seen.append(batch)
        return torch.nn.functional.cross_entropy(output.logits, batch["labels"])

    own = started(batches=batches, loss=loss, init_experts="gradient", **WARM)
    assert_same_state(
        adapter_state(own), adapter_state(started(batches=batches, init_experts="gradient", **WARM)), 1e-6
    )
    assert all(found is given for found, given in zip(seen, batches))


def padded_further(batch, fill):
    """The same tokens with five more positions, which hold something else."""
    extra = torch.full((len(batch["input_ids"]), 5), fill)
    longer = {**batch, "input_ids": torch.cat([batch["input_ids"], extra], 1)}
    longer["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros_like(extra)], 1)
    if "labels" in batch and batch["labels"].shape == batch["input_ids"].shape:
        longer["labels"] = torch.cat([batch["labels"], torch.full_like(extra, -100)], 1)
    return longer


PADDED = [
    ("bert", "hosvd"), ("deberta", "hosvd"), ("gpt2", "hosvd"), ("llama", "hosvd"), ("t5", "hosvd"),
    ("bert", "gradient"), ("gpt2", "gradient"), ("t5", "gradient"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "experts"), PADDED)
def test_padding_changes_nothing(name, experts):
    """The same tokens, five more positions of garbage; T5's cross-attention reads them too, its decoder has none."""
    batches = batches_for(name, dtype=torch.float64)
    if name == "gpt2":
        for batch in batches:
            batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    longer = [padded_further(batch, 33) for batch in batches]
    expected, found = (
        formed(started(name, given, torch.float64, init_experts=experts, **WARM)) for given in (batches, longer)
    )
    assert_same_state(found, expected, 1e-6)


def formed(model):
    """Experts and shared slices as they act: their factors are unique up to signs alone."""
    parts = {layer.name: layer.tucka_experts["default"] for layer in layers_of(model)}
    with torch.no_grad():
        whole = {name: part.to_tensor() for name, part in parts.items()}
        shared = {name + " shared": p.input_mode @ p.shared_core @ p.output_mode.T for name, p in parts.items()}
    return {**whole, **shared, "centroids": router_of(model).centroids.detach()}


@pytest.mark.parametrize(("name", "experts"), [("bert", "gradient"), ("llama", "hosvd"), ("vit", "gradient")])
def test_reduced_precision(name, experts, tmp_path):
    """The algebra is in float32; only the activations are rounded."""
    model = started(name, dtype=torch.bfloat16, init_experts=experts, **WARM)
    state = adapter_state(model)
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())
    assert all(value.isfinite().all() for value in state.values())
    full = started(name, init_experts=experts, **WARM)
    for layer, other in zip(layers_of(model), layers_of(full)):
        found, expected = (one.tucka_experts["default"].input_mode for one in (layer, other))
        # bfloat16 keeps 8 bits: the leading directions are the same, near ties among the last may not be.
        assert torch.linalg.svdvals(found.T @ expected)[0] > 0.99
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(name).to(torch.bfloat16), tmp_path)
    assert_same_state(adapter_state(again), state)


CHECKPOINTED = [
    ("bert", False),
    ("bert", True),
    ("gpt2", False),
    ("gpt2", True),
    ("llama", False),
    ("t5", True),
    ("vit", True),
]


@pytest.mark.parametrize(("name", "reentrant"), CHECKPOINTED)
def test_checkpointing_changes_nothing(name, reentrant):
    expected = adapter_state(started(name, init_experts="gradient", **WARM))
    model, calls = unstarted(name, init_experts="gradient", **WARM), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # which reentrant checkpoints ask of any frozen model
    layers_of(model)[0].register_forward_hook(lambda *args: calls.append(1))
    tucka.initialize(model, batches_for(name), progress=False)
    assert len(calls) == 3 * 2, "every batch of the second pass ran twice through this layer"
    assert_same_state(adapter_state(model), expected, 1e-5)


def test_a_reentrant_checkpoint_without_gradient_below_it_says_what_to_do():
    model = unstarted("vit", init_experts="gradient")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"does not depend on any adapted layer \(with reentrant checkpointing, call"):
        tucka.initialize(model, batches_for("vit"), progress=False)
