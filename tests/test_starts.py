"""Starts of the router: from data, without it, and only once."""

import pytest
import torch
from conftest import batch_for, build
from peft import PeftModel, get_peft_model

import tucka


def router_of(model):
    return next(router for layer in tucka.model.layers_of(model) for router in layer.tucka_router.values())


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
    config = tucka.TuckAConfig(r=4, routing=routing, perturb_scale=0.5)
    model = tucka.apply(build("bert"), config, calibration=[batch, "never reached"])
    router = router_of(model)
    mean = first_feature(model, batch).mean(0)
    torch.testing.assert_close(router.centroids[0], mean)
    spread = router.centroids[1:] - mean
    assert 0.45 < spread.abs().max() <= 0.5 and spread.mean().abs() < 0.05
    assert bool(router.initialised) and not router.awaits_start


def test_without_calibration_the_first_trainable_forward_starts_the_router_in_place():
    model = get_peft_model(build("bert"), tucka.TuckAConfig(r=4, target_modules=["query"]))
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
    model = tucka.apply(build("bert"), calibration=[batch_for("bert")])
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
    tucka.initialize(model, [batch_for("bert")])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("form", ["mapping", "tuple", "tensor"])
def test_any_form_of_batch(form):
    batch = batch_for("bert")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    given = {"mapping": {"input_ids": ids, "attention_mask": mask}, "tuple": (ids, mask), "tensor": ids}[form]
    model = tucka.apply(build("bert"), tucka.TuckAConfig(r=4, target_modules=["query"]), calibration=[given])
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
    model = tucka.apply(build("bert"), tucka.TuckAConfig(r=4, init_router="kaiming"))
    with pytest.raises(ValueError, match="starts without data: init_router='kaiming' and init_experts='identity' read none"):
        tucka.initialize(model, [batch_for("bert")])
    with pytest.raises(ValueError, match="calibration yields no batch; the start needs one"):
        tucka.apply(build("bert"), calibration=[])
    with pytest.raises(ValueError, match=r"the model has no Tucker experts; wrap it with tucka.apply first"):
        tucka.initialize(build("bert"), [batch_for("bert")])
    with pytest.raises(ValueError, match=r"adapter 'other' is not one of \['default'\]"):
        tucka.initialize(model, [batch_for("bert")], adapter_name="other")


def test_each_tower_is_started():
    batch = batch_for("clip")
    model = tucka.apply(build("clip"), calibration=[batch])
    routers = [router for layer in tucka.model.layers_of(model) for router in layer.tucka_router.values()]
    assert len(routers) == 2 and all(router.initialised and not router.awaits_start for router in routers)


class TestBalancing:
    """Auxiliary-loss-free balancing: −γ(K−1) for the chosen group, +γ for the others, outside the gates."""

    def model(self, **fields):
        torch.manual_seed(0)
        config = tucka.TuckAConfig(r=4, k=3, balance_bias=True, balance_rate=0.5, target_modules=["query"], **fields)
        return tucka.apply(build("bert"), config, calibration=[batch_for("bert")])

    def test_a_training_forward_moves_the_bias_after_its_choice(self):
        model = self.model(routing="batch")
        with tucka.record_routes(model) as routes:
            model.train()(**batch_for("bert"))
        expected = torch.full((3, 2), 0.5)
        expected[routes[0].group[0]] = -1.0
        assert torch.equal(router_of(model).balance_bias, expected)
        torch.testing.assert_close(routes[0].gates[0], routes[0].scores[0, routes[0].group[0]])

    def test_the_bias_moves_the_choice_and_not_the_gates(self):
        model = self.model(routing="batch").eval()
        batch = batch_for("bert")
        with torch.no_grad(), tucka.record_routes(model) as routes:
            model(**batch)
            other = (int(routes[0].group) + 1) % 3
            router_of(model).balance_bias[other] = 10
            model(**batch)
        assert int(routes[1].group) == other
        assert torch.equal(routes[1].scores, routes[0].scores)
        assert torch.equal(routes[1].gates[0], routes[0].scores[0, other])

    def test_samples_count_by_their_share(self):
        from tucka.balance import bias_step

        step = bias_step(torch.tensor([0, 0, 2, 0]), groups=3, rate=0.1)
        torch.testing.assert_close(step, 0.1 * (1 - 3 * torch.tensor([0.75, 0.0, 0.25])))

    def test_evaluation_and_recomputation_do_not_count(self):
        model = self.model()
        with torch.no_grad():
            model.train()(**batch_for("bert"))
        model.eval()(**batch_for("bert"))
        assert not router_of(model).balance_bias.any()
        once = self.model().train()
        once.gradient_checkpointing_enable({"use_reentrant": False})
        once(**batch_for("bert")).loss.backward()
        reference = self.model().train()
        reference(**batch_for("bert")).loss.backward()
        assert torch.equal(router_of(once).balance_bias, router_of(reference).balance_bias)
        assert router_of(once).balance_bias.any()

    def test_it_spreads_a_router_that_had_collapsed(self):
        model, batch = self.model().train(), batch_for("bert")
        with tucka.record_routes(model) as routes:
            for _ in range(12):
                model(**batch)
        assert len({int(group) for route in routes for group in route.group}) == 3

    def test_the_bias_is_saved(self, tmp_path):
        model = self.model().train()
        model(**batch_for("bert"))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(build("bert"), tmp_path)
        assert router_of(model).balance_bias.any()
        assert torch.equal(router_of(again).balance_bias, router_of(model).balance_bias)
