"""Revival of dead groups from the busiest one."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import adapted, batch_for, build, plain_config, randomise, router_of
from torch import distributed, nn

import tucka
from tucka.balance import max_violation, record_loads
from tucka.revival import revive, two_means


def texts(samples, seed, topics=4, width=11):
    """Sequences whose tokens come from one of several vocabularies, so that features form clusters."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.arange(samples) % topics
    tokens = torch.randint(0, width, (samples, 7), generator=generator) + 3 + width * topic.unsqueeze(1)
    return {"input_ids": tokens, "labels": topic % 2}


def load_of(model, batches):
    """The share of units that choose each group, counted from recorded routes."""
    with torch.no_grad(), tucka.record_routes(model) as routes:
        for batch in batches:
            model(**batch)
    groups = torch.cat([route.group for route in routes])
    return torch.bincount(groups, minlength=router_of(model).config.k) / len(groups)


def collapsed(dead=(1, 2, 3), routing="sample", affinity="paper", **fields):
    """A model of four groups whose dead ones have centroids that no unit comes near, and its batches."""
    torch.manual_seed(0)
    fields = {"r": 4, "k": 4, "target_modules": ["query", "value"], "balance_bias": True, **fields}
    config = plain_config(routing=routing, affinity=affinity, **fields)
    batches = [texts(24, seed) for seed in range(6)]
    if routing == "batch":  # batches of one topic each: what is routed are batches
        batches = [{key: value[i::4] for key, value in batch.items()} for batch in batches for i in range(4)]
    model = randomise(tucka.apply(build("bert"), config, calibration=batches), 0.1).eval()
    router = router_of(model)
    centroids = router.centroids.data.view(4, config.t, -1)
    alive = [group for group in range(4) if group not in dead]
    for group in dead:
        centroids[group] = -centroids[alive[0]] if affinity == "paper" else centroids[group] + 100
    if affinity == "paper":  # all that live agree, so the first of them takes all
        centroids[alive[1:]] = -centroids[alive[0]]
    return model, batches


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("affinity", ["paper", "cosine", "distance"])
@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_a_forced_collapse_recovers(routing, affinity):
    model, batches = collapsed(routing=routing, affinity=affinity)
    assert load_of(model, batches).tolist() == [1, 0, 0, 0]
    report = revive(model, batches)[""]
    found = load_of(model, batches)
    assert torch.equal(report.before, torch.tensor([1.0, 0, 0, 0])) and torch.allclose(report.after, found)
    assert [dead for dead, _ in report.pairs] == [1, 2, 3] and report.left == ()
    assert found.min() > 0.1 / 4 and max_violation(found) < 1
    held_out = [texts(24, 100 + seed) for seed in range(4)]
    assert routing == "batch" or load_of(model, held_out).min() > 0.1 / 4
    assert revive(model, batches)[""].pairs == (), "nothing is dead any more"


@pytest.mark.parametrize("experts", [1, 2])
def test_each_half_gets_its_topic(experts):
    """Two topics in one group, whose centroid is their mean: the two groups' centroids become the topics' means."""
    config = plain_config(
        r=4, k=2, t=experts, affinity="distance", init_router="kmeans", target_modules=["query", "value"]
    )
    batches = [texts(20, seed, topics=2, width=2) for seed in range(4)]
    model = tucka.apply(build("bert"), config, calibration=batches).eval()
    router, seen = router_of(model), []
    handle = router.register_forward_pre_hook(lambda module, args: seen.append(module.placed(args[0])))
    load_of(model, batches)
    handle.remove()
    features = torch.cat(seen)
    with torch.no_grad():
        router.centroids[:experts] = features.mean(0)
        router.centroids[experts:] = 100
    assert load_of(model, batches).tolist() == [1, 0]
    assert revive(model, batches)[""].pairs == ((1, 0),)
    with torch.no_grad(), tucka.record_routes(model) as routes:
        model(**batches[0])
    users = [set(routes[0].group[topic::2].tolist()) for topic in range(2)]
    assert sorted(map(sorted, users)) == [[0], [1]]
    means = {users[topic].pop(): features[topic::2].mean(0) for topic in range(2)}
    for group in range(2):
        for centroid in router.centroids.view(2, experts, -1)[group]:
            torch.testing.assert_close(centroid, means[group], rtol=0, atol=1e-5)


@pytest.mark.parametrize("affinity", ["paper", "distance"])
def test_the_experts_of_both_are_the_same_and_others_untouched(affinity):
    model, batches = collapsed(dead=(3,), affinity=affinity, init_router="kmeans")
    with torch.no_grad():
        router_of(model).balance_bias.copy_(torch.tensor([-0.3, 0.1, -0.2, 0.4]).view(4, 1) * 1e-3)
    parameters = dict(model.named_parameters())
    before, bias = state_of(model), router_of(model).balance_bias.clone()
    report = revive(model, batches)[""]
    ((dead, busiest), *others) = report.pairs
    assert affinity == "paper" or (dead == 3 and not others)
    for layer in tucka.model.layers_of(model):
        core = layer.tucka_experts["default"].core
        old = before[next(name for name, p in parameters.items() if p is core)]
        for one, other in report.pairs:
            assert torch.equal(core[one], core[other]) and torch.equal(core[other], old[report.pairs[0][1]])
        untouched = [g for g in range(4) if g not in [group for pair in report.pairs for group in pair]]
        assert torch.equal(core[untouched], old[untouched])
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    changed = {
        name.rsplit(".", 1)[-1] for name, value in state_of(model).items() if not torch.equal(value, before[name])
    }
    assert changed == {"core", "centroids", "balance_bias"}
    after = router_of(model).balance_bias
    torch.testing.assert_close(after.sum(0), bias.sum(0), rtol=0, atol=1e-8)
    if not others:
        torch.testing.assert_close(after[dead], (bias[dead] + bias[busiest]) / 2)
        assert torch.equal(after[dead], after[busiest])


def test_an_output_changes_as_far_as_its_gates_do():
    """With the old gates forced on the moved units, the copied experts give the old outputs."""
    model, batches = collapsed(affinity="distance", dead=(3,), init_router="kmeans")
    batch = batches[0]
    with torch.no_grad(), tucka.record_routes(model) as routes:
        before = model(**batch).logits
        ((dead, busiest),) = revive(model, batches)[""].pairs
        model(**batch)
        moved = (routes[1].group == dead) & (routes[0].group == busiest)
        with tucka.pin_route(model, tucka.Route(routes[1].group, routes[0].gates)):
            after = model(**batch).logits
    assert moved.any()
    torch.testing.assert_close(after[moved], before[moved])


def test_everything_is_left_as_found():
    model, batches = collapsed()
    model.train()
    model.get_base_model().classifier.eval()
    model(**batches[0]).loss.backward()
    modes = [module.training for module in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    trains = [p.requires_grad for p in model.parameters()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    state = torch.random.get_rng_state()
    with record_loads(model) as loads, tucka.record_routes(model) as routes:
        revive(model, batches)
    assert routes == [] and int(loads.training.load().units) == int(loads.evaluation.load().units) == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trains
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == hooks
    for parameter, gradient in zip(model.parameters(), gradients):
        assert (parameter.grad is None) if gradient is None else torch.equal(parameter.grad, gradient)


def test_nothing_is_half_done_when_the_loader_raises():
    model, batches = collapsed()
    model.train()
    before, state = state_of(model), torch.random.get_rng_state()
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]

    def failing():
        torch.rand(3)
        yield batches[0]
        raise OSError("disk")

    for loader, error in ((failing(), OSError), ([batches[0], {"labels": torch.zeros(1)}], ValueError)):
        with pytest.raises(error):
            revive(model, loader)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.random.get_rng_state(), state) and all(m.training for m in model.modules())
        assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == hooks
    assert len(revive(model, batches)[""].pairs) == 3, "and it can be called again"


def test_a_group_that_cannot_be_split_is_left():
    model, batches = collapsed()
    same = {key: value[:1].repeat(8, *[1] * (value.ndim - 1)) for key, value in batches[0].items()}
    before = state_of(model)
    report = revive(model, [same])[""]
    assert report.pairs == () and report.left == (1, 2, 3) and torch.equal(report.before, report.after)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_as_many_units_as_asked_for():
    model, batches = collapsed()

    def endless():
        for index in range(100):
            assert index < 2, "read on after enough samples"
            yield batches[index]

    revive(model, endless(), samples=48)


def test_the_named_adapter_alone():
    model, batches = collapsed()
    model.add_adapter("other", plain_config(r=4, k=2, init_router="kaiming"))
    model.set_adapter("other")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    before = state_of(model)
    report = revive(model, batches, adapter_name="default")[""]
    assert len(report.pairs) == 3 and model.active_adapter == "other"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".default" in name for name in changed)


def test_each_tower():
    model = adapted("clip", k=3, affinity="paper").eval()
    routers = [r for layer in tucka.model.layers_of(model) for r in layer.tucka_router.values()]
    batches = [batch_for("clip", samples=samples) for samples in range(20, 26)]
    with torch.no_grad():
        routers[1].centroids.view(3, 2, -1)[1:] = -routers[1].centroids.view(3, 2, -1)[:1]
    with record_loads(model) as loads, torch.no_grad():
        for batch in batches:
            model(**batch)
    with tucka.pin_route(model, {"text_model": [0, 1], "vision_model": [0, 1]}):  # of two samples, not of twenty
        report = revive(model, batches)
    assert set(report) == set(loads) == {"text_model", "vision_model"}
    for tower, meter in loads.items():
        torch.testing.assert_close(report[tower].before, meter.evaluation.load().group_share)
    assert any(revival.pairs for revival in report.values())


class OneOfTwo(nn.Module):
    """Two encoders, of which a forward runs one."""

    def __init__(self):
        super().__init__()
        self.question, self.document = build("bert"), build("bert")

    def forward(self, input_ids):
        return self.question(input_ids)


def test_a_tower_that_no_batch_reaches_is_left():
    model = tucka.apply(OneOfTwo(), plain_config(r=4, init_router="kaiming", target_modules=["query"])).eval()
    router = model.base_model.model.document.bert.encoder.layer[0].attention.self.query.tucka_router["default"]
    before = router.centroids.clone()
    with tucka.record_routes(model) as routes, record_loads(model) as loads:
        report = revive(model, [texts(20, 0)["input_ids"]])
    assert set(report) == {"question"} and torch.equal(router.centroids, before)
    assert not any(routes.values()), "calibration forwards are recorded by nobody"
    assert not any(int(meter.evaluation.load().units) for meter in loads.values())


def test_what_cannot_be_revived():
    model, batches = collapsed()
    with pytest.raises(ValueError, match=r"threshold=1.5 is a part of an even load: it must lie in \(0, 1\]"):
        revive(model, batches, threshold=1.5)
    with pytest.raises(ValueError, match="samples=0 is not a number of routed units of at least 1"):
        revive(model, batches, samples=0)
    with pytest.raises(ValueError, match="calibration yields no batch; a revival needs units to split"):
        revive(model, [])
    with pytest.raises(ValueError, match=r"adapter 'other' is not one of \['default'\]"):
        revive(model, batches, adapter_name="other")
    with pytest.raises(ValueError, match="the router of adapter 'default' has not started, so no group is dead yet"):
        revive(tucka.apply(build("bert"), plain_config(r=4)), batches)


def test_two_means_against_all_partitions():
    """The split is the one of least summed squares among all 2^(n−1) of few points."""
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 3)))

    def cost(members):
        halves = [points[members], points[~members]]
        return sum(float((half - half.mean(0)).square().sum()) for half in halves if len(half))

    every = [torch.tensor([code >> bit & 1 for bit in range(9)]).bool() for code in range(1, 2**8)]
    found = two_means(points)
    assert found.sum() <= 4
    assert cost(found) == pytest.approx(min(map(cost, every)))
    assert two_means(points[:1]) is None and two_means(points[:1].repeat(5, 1)) is None


def revive_in_process(rank, directory):
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    model, batches = collapsed()
    report = revive(model, batches[rank::2])[""]
    torch.save((report, model.state_dict()), f"{directory}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_stay_the_same(tmp_path):
    mp.spawn(revive_in_process, (str(tmp_path),), nprocs=2)
    (report, state), (other_report, other) = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(2))
    assert report.pairs == other_report.pairs and len(report.pairs) == 3
    assert all(torch.equal(value, other[name]) for name, value in state.items())
