"""Starts of the router: from data, without it, and only once."""

import pytest
import torch
from conftest import batch_for, build, plain_config, router_of
from peft import PeftModel, get_peft_model

import tucka


def first_feature(model, batch):
    """What the router pooled in the last forward over the batch."""
    router, seen = router_of(model), []
    pooled = router.feature
    router.feature = lambda *args: seen.append(pooled(*args)) or seen[-1]
    with torch.no_grad():
        model.eval()(**batch)
    del router.feature
    return seen[0]


@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_calibration_runs_the_papers_start(routing):
    batch = batch_for("bert")
    config = plain_config(r=4, routing=routing, perturb_scale=0.5)
    model = tucka.apply(build("bert"), config, calibration=[batch, "never reached"])
    router = router_of(model)
    mean = first_feature(model, batch).mean(0)
    torch.testing.assert_close(router.centroids[0], mean)
    spread = router.centroids[1:] - mean
    assert 0.45 < spread.abs().max() <= 0.5 and spread.mean().abs() < 0.05
    assert bool(router.initialised) and not router.awaits_start


def test_without_calibration_the_first_trainable_forward_starts_the_router_in_place():
    model = get_peft_model(build("bert"), plain_config(r=4, target_modules=["query"]))
    parameter, batch = router_of(model).centroids, batch_for("bert")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    before = parameter.clone()
    with torch.no_grad():
        model(**batch)
    assert torch.equal(parameter, before), "a forward that cannot train must not start it"
    model.train()(**batch).loss.backward()
    assert router_of(model).centroids is parameter
    assert any(held is parameter for held in optimiser.param_groups[0]["params"])
    started = parameter.clone()
    assert not torch.equal(started, before) and parameter.grad is not None
    model(**batch_for("bert", samples=2)).loss.backward()
    assert torch.equal(parameter, started), "the second batch must not start it again"


def test_a_reloaded_router_is_not_started_again(tmp_path):
    model = tucka.apply(build("bert"), calibration=[batch_for("bert", samples=8)])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True).train()
    expected = router_of(again).centroids.clone()
    assert torch.equal(expected, router_of(model).centroids)
    again(**batch_for("bert", samples=2)).loss.backward()
    assert torch.equal(router_of(again).centroids, expected)


def test_a_router_saved_before_its_start_starts_after_reloading(tmp_path):
    tucka.apply(build("bert")).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True).train()
    before = router_of(again).centroids.clone()
    again(**batch_for("bert")).loss.backward()
    assert not torch.equal(router_of(again).centroids, before)


def test_initialize_leaves_modes_gradients_and_random_state_as_found():
    model = tucka.apply(build("bert")).train()
    model.get_base_model().classifier.eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    tucka.initialize(model, [batch_for("bert", samples=8)])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("form", ["mapping", "tuple", "tensor"])
def test_any_form_of_batch(form):
    batch = batch_for("bert")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    given = {"mapping": {"input_ids": ids, "attention_mask": mask}, "tuple": (ids, mask), "tensor": ids}[form]
    model = tucka.apply(build("bert"), plain_config(r=4, target_modules=["query"]), calibration=[given])
    assert router_of(model).initialised


def test_a_failing_calibration_leaves_the_model_as_it_was():
    base = build("bert")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="You must specify exactly one of input_ids or inputs_embeds"):
        tucka.apply(base, calibration=[{"labels": torch.zeros(1)}])
    assert [name for name, _ in base.named_modules()] == names
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())
    tucka.apply(base)


def test_what_cannot_be_calibrated():
    model = tucka.apply(build("bert"), plain_config(r=4, init_router="kaiming"))
    message = "starts without data: init_router='kaiming' and init_experts='identity' read none"
    with pytest.raises(ValueError, match=message):
        tucka.initialize(model, [batch_for("bert")])
    with pytest.raises(ValueError, match="calibration yields no batch; the start needs one"):
        tucka.apply(build("bert"), calibration=[])
    with pytest.raises(ValueError, match=r"the model has no Tucker experts; wrap it with tucka.apply first"):
        tucka.initialize(build("bert"), [batch_for("bert")])
    with pytest.raises(ValueError, match=r"adapter 'other' is not one of \['default'\]"):
        tucka.initialize(model, [batch_for("bert")], adapter_name="other")


def test_each_tower_is_started():
    batch = batch_for("clip", samples=8)
    model = tucka.apply(build("clip"), calibration=[batch])
    routers = [router for layer in tucka.model.layers_of(model) for router in layer.tucka_router.values()]
    assert len(routers) == 2 and all(router.initialised and not router.awaits_start for router in routers)
