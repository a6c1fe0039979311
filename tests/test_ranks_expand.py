"""More groups and experts without another function, and fewer by load."""

import pytest
import torch
from conftest import (
    adapter_state,
    assert_same_state,
    batch_for,
    batches_for,
    build,
    first_output,
    plain_config,
    randomise,
    router_of,
)
from peft import PeftModel

import tucka
from tucka.model import layers_of
from tucka.ranks import expand, prune

ARCHITECTURES = ["bert", "vit", "gpt2", "llama", "t5"]


def trained(name="bert", dtype=torch.float64, batches=None, scale=0.1, **fields):
    """A model whose centroids come from its data."""
    torch.manual_seed(0)
    fields = {"r": 4, "k": 3, "t": 2, "affinity": "cosine", "form": "additive", "init_router": "kmeans", **fields}
    batches = batches_for(name, samples=24, size=8, dtype=dtype) if batches is None else batches
    model = randomise(tucka.apply(build(name, dtype), plain_config(**fields), calibration=batches), scale)
    return model.eval(), batches


def outputs(model, batches):
    with torch.no_grad(), tucka.record_routes(model) as routes:
        found = [first_output(model(**batch)) for batch in batches]
    return torch.cat([x.flatten() for x in found]), torch.cat([route.group for route in routes])


CASES = [("paper", 5, None), ("cosine", 5, None), ("cosine", None, 3), ("cosine", 7, 5), ("distance", 5, 3)]


@pytest.mark.parametrize("with_loader", [True, False])
@pytest.mark.parametrize("normalize", [False, True, "bounded"])
@pytest.mark.parametrize("affinity, k, t", CASES)
def test_outputs_stay_and_units_choose_copies_of_their_group(affinity, k, t, normalize, with_loader):
    scale = 0.1 / 2.5 if normalize == "bounded" else 0.1  # updates of one size
    fields = dict(affinity=affinity, normalize=normalize, core_gain=2.5)
    model, batches = trained(**fields, init_experts="kaiming", scale=scale)
    expected, groups = outputs(model, batches)
    report = expand(model, batches if with_loader else None, k=k, t=t)[""]
    found, chosen = outputs(model, batches)
    assert float((found - expected).abs().max()) < 1e-6
    assert torch.equal(torch.tensor(report.groups)[chosen], groups)
    assert len(report.groups) == (k or 3) and len(report.experts) == (t or 2)
    config = model.peft_config["default"]
    assert (config.k, config.t) == (k or 3, t or 2)
    assert config.normalize == (False if normalize is True and t else normalize)
    if with_loader:
        torch.testing.assert_close(report.load, torch.bincount(chosen, minlength=k or 3) / 24)
        assert k != 5 or report.load.min() > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_new_receives_gradient_saves_and_loads(name, tmp_path):
    model, batches = trained(name, torch.float32, share_factors=True, init_experts="kaiming", scale=0.05)
    expected, _ = outputs(model, batches)
    expand(model, batches, k=4, t=3)
    found, _ = outputs(model, batches)
    # An update of some percent of the logits; t5, of logits of 5, is rounded to more than 1e-6 by itself.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 if name == "t5" else 1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_same_state(adapter_state(loaded), adapter_state(model))
    assert torch.equal(outputs(loaded, batches)[0], found)
    for batch in batches:
        model(**batch).loss.backward()
    layer = layers_of(model)[-1].tucka_experts["default"]
    assert all(bool(layer.core.grad[group].any()) for group in range(4))
    assert all(bool(layer.expert_factor.grad[expert].any()) for expert in range(3))
    assert all(bool(row.any()) for row in router_of(model).centroids.grad)


def test_copies_learn_different_things():
    model, batches = trained()
    expand(model, batches, t=4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for batch in batches:
        model(**batch).loss.backward()
    optimizer.step()
    centroids = router_of(model).centroids.detach().view(3, 4, -1)
    assert float((centroids[:, 0] - centroids[:, 2]).abs().max()) > 1e-8


def test_it_can_be_done_again():
    model, batches = trained(affinity="distance", normalize="bounded", init_experts="kaiming")
    expected, groups = outputs(model, batches)
    one = expand(model, batches, k=4, t=3)[""]
    two = expand(model, batches, k=6)[""]
    found, chosen = outputs(model, batches)
    assert float((found - expected).abs().max()) < 1e-6
    assert torch.equal(torch.tensor(one.groups)[torch.tensor(two.groups)][chosen], groups)
    shares = router_of(model).log_share.exp()
    torch.testing.assert_close(shares.sum(), shares.new_tensor(6.0), msg="all shares are those of 3·2 experts")


def test_balancing_bias_other_adapters_and_layers_before_the_router():
    model, batches = trained(balance_bias=True, router_depth=1)
    with torch.no_grad():
        router_of(model).balance_bias.copy_(torch.tensor([[0.1], [0.0], [-0.1]]).expand(3, 2))
    model.add_adapter("other", plain_config(r=2, k=2, init_router="kaiming"))
    model.eval()
    expected, groups = outputs(model, batches)
    before = {k: v for k, v in adapter_state(model).items() if ".other" in k}
    report = expand(model, batches, k=5)[""]
    found, chosen = outputs(model, batches)
    assert float((found - expected).abs().max()) < 1e-6
    assert torch.equal(torch.tensor(report.groups)[chosen], groups)
    assert_same_state({k: v for k, v in adapter_state(model).items() if ".other" in k}, before)


def test_an_optimiser_carried_along_has_the_copies_of_its_moments():
    model, batches = trained()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**batches[0]).loss.backward()
    optimizer.step()
    core = layers_of(model)[0].tucka_experts["default"].core
    before = optimizer.state[core]["exp_avg_sq"].clone()
    report = expand(model, batches, k=5, optimizer=optimizer)[""]
    torch.testing.assert_close(optimizer.state[core]["exp_avg_sq"], before[list(report.groups)])
    model(**batches[0]).loss.backward()
    optimizer.step()


def test_each_tower():
    batches = [batch_for("clip", samples=8, dtype=torch.float64)]
    model, _ = trained("clip", batches=batches, k=2)
    batch = batches[0]
    with torch.no_grad():
        expected = first_output(model(**batch))
        report = expand(model, batches, k=3, t=3)
        torch.testing.assert_close(
            first_output(model(**batch)), expected, rtol=0, atol=14e-6
        )  # similarities are scaled by 14
    assert set(report) == {"text_model", "vision_model"}


def test_what_cannot_be_expanded():
    model, _ = trained()
    paper, _ = trained(affinity="paper", init_router="perturb")
    single, _ = trained(affinity="paper", init_router="perturb", t=1, p=1)
    waiting = tucka.apply(build("bert"), plain_config(r=4, affinity="cosine"))
    for subject, arguments, message in (
        (model, dict(), "nothing to add: the adapter has k=3 groups of t=2 experts"),
        (model, dict(k=2), "k=2 must be a whole number of at least k=3"),
        (model, dict(t=True), "t=True must be a whole number of at least t=2"),
        (paper, dict(t=3), "affinity='paper' divides a group's logits by their norm, which a copied expert changes"),
        (single, dict(k=4), "with affinity='paper' and t=1 scores are signs"),
        (waiting, dict(k=5), "the router of adapter 'default' has not started"),
    ):
        state = adapter_state(subject)
        with pytest.raises(ValueError, match=message):
            expand(subject, **arguments)
        assert_same_state(adapter_state(subject), state)
    state = adapter_state(model)
    with pytest.raises(ValueError, match="calibration yields no batch"):
        expand(model, [], k=4)
    assert_same_state(adapter_state(model), state)


# --- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True, "bounded"])
def test_pruning_keeps_the_experts_of_what_stays(normalize, tmp_path):
    model, batches = trained(k=4, t=3, normalize=normalize, init_experts="kaiming")
    load = torch.tensor([[0.2, 0.2, 0.0], [0.0, 0.01, 0.0], [0.3, 0.1, 0.0], [0.1, 0.09, 0.0]])
    before = {layer.name: layer.tucka_experts["default"].to_tensor().detach() for layer in layers_of(model)}
    report = prune(model, load=load, k=2, t=2)[""]
    assert report.dropped_groups == (1, 3) and report.dropped_experts == (2,) and report.lost == pytest.approx(0.2)
    for layer in layers_of(model):
        found = layer.tucka_experts["default"].to_tensor()
        torch.testing.assert_close(found, before[layer.name][[0, 2]][:, :2], rtol=1e-6, atol=1e-9)
    expected, _ = outputs(model, batches)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert", torch.float64), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, batches)[0], expected, rtol=1e-5, atol=1e-6)


def test_pruning_by_a_loader_drops_what_no_unit_chooses():
    model, batches = trained(affinity="distance", k=4)
    with torch.no_grad():
        router_of(model).centroids.view(4, 2, -1)[2] += 1e3
    expected, groups = outputs(model, batches)
    report = prune(model, batches)[""]
    assert report.dropped_groups == (2,) and report.lost == 0
    found, chosen = outputs(model, batches)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert torch.equal(torch.tensor([0, 1, 3])[chosen], groups)
    state = adapter_state(model)
    assert prune(model, batches, threshold=1e-6)[""].dropped_groups == ()
    assert_same_state(adapter_state(model), state)


def test_what_cannot_be_pruned():
    model, batches = trained()
    state = adapter_state(model)
    for arguments, message in (
        (dict(), "give either calibration batches or the load to prune by"),
        (dict(calibration=batches, threshold=0.0), r"threshold=0.0 is a part of an even load"),
        (dict(calibration=batches, k=4), "k=4 must be a whole number from 1 to k=3"),
        (dict(load=torch.ones(2, 2)), r"load is \(2, 2\), but the adapter's experts are k=3 by t=2"),
        (dict(load=torch.zeros(3, 2)), "load must be finite and not negative, and something must have been counted"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, **arguments)
    assert_same_state(adapter_state(model), state)
