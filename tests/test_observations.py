"""What an adapter does on data, against the model itself and experts formed in float64."""

import numpy as np
import pytest
import torch
from conftest import adapted, adapter_state, assert_same_state, batch_for, batches_for

import analysis.observations as obs
import tucka
from analysis import routes
from analysis.observations import expert_movement, group_movement, observe
from tucka.model import layers_of

NAMES = ["bert", "deberta", "vit", "gpt2", "llama", "t5", "clip"]


def a_model(name="bert", **fields):
    return adapted(name, torch.float64, k=3, t=2, p=2, **fields).eval()


def true_rows(model, batch, form):
    """Input, what an update is added to, and the output of the adapted linear, of every layer: by hooks."""
    seen = {}

    def listen(layer):
        def before(module, args):
            seen.setdefault(layer.name, []).append(args[0].detach())

        def after(module, args, output):
            # Multiplicative: what the base layer is given; additive: the layer's output against the base layer's.
            seen.setdefault(layer.name + "/base", []).append((args[0].detach(), output.detach()))

        def whole(module, args, output):
            seen.setdefault(layer.name + "/out", []).append(output.detach())

        return [
            layer.register_forward_pre_hook(before),
            layer.base_layer.register_forward_hook(after),
            layer.register_forward_hook(whole),
        ]

    handles = [handle for layer in layers_of(model) for handle in listen(layer)]
    with torch.no_grad(), tucka.record_routes(model) as recorded:
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen, recorded


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
def test_movements_are_those_of_the_forward(form):
    model = a_model(form=form)
    batch = batch_for("bert", dtype=torch.float64)
    observed = observe(model, [batch], progress=False)
    seen, (route,) = true_rows(model, batch, form)
    keep = batch["attention_mask"].bool()
    table = group_movement(observed).set_index(["layer", "group"])["movement"]
    single = expert_movement(observed).set_index(["layer", "group", "expert"])["movement"]
    assert np.array_equal(observed.routing[""].group, route.group.numpy())
    np.testing.assert_allclose(observed.routing[""].gates, route.gates.numpy())
    for layer in layers_of(model):
        x = seen[layer.name][0]
        if x.ndim == 2:  # the pooler's first token
            continue
        given, put_out = seen[layer.name + "/base"][0]
        before, after = (x, given) if form == "multiplicative" else (put_out, seen[layer.name + "/out"][0])
        moved = (after - before).norm(dim=-1) / before.norm(dim=-1)
        acting = observed.adapter.layer(layer.name)
        for group in range(3):
            rows = keep & (route.group == group).unsqueeze(1)
            if not rows.any():
                assert np.isnan(table[layer.name, group])
                continue
            assert table[layer.name, group] == pytest.approx(moved[rows].mean().item(), rel=1e-9)
            for expert in range(2):
                slice_RR = acting.slices[group, expert]
                update = acting.alpha * x @ acting.input_factor @ slice_RR @ acting.output_factor.mT
                gated = update * route.gates[:, expert, None, None]
                expected = (gated.norm(dim=-1) / before.norm(dim=-1))[rows].mean().item()
                assert single[layer.name, group, expert] == pytest.approx(expected, rel=1e-9)


def test_moments_are_those_of_unpadded_rows():
    model, batches = a_model(), batches_for("bert", samples=12, size=5, dtype=torch.float64)
    observed = observe(model, batches, progress=False)
    layer = next(layer for layer in layers_of(model) if layer.name.endswith("query"))
    rows = []
    for batch in batches:
        seen, _ = true_rows(model, batch, "multiplicative")
        rows.append(seen[layer.name][0][batch["attention_mask"].bool()])
    projected = (torch.cat(rows) @ observed.adapter.layer(layer.name).input_factor).numpy()
    found = observed.layers[layer.name]
    np.testing.assert_allclose(found.mean, projected.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.covariance, np.cov(projected.T, bias=True), rtol=1e-8, atol=1e-12)
    assert found.rows.sum() == len(projected)


def test_movements_are_the_same_in_parts(monkeypatch):
    model, batches = a_model(), batches_for("bert", samples=6, size=3, dtype=torch.float64)
    whole = group_movement(observe(model, batches, progress=False))["movement"]
    monkeypatch.setattr(obs, "CHUNK", 1)
    parts = group_movement(observe(model, batches, progress=False))["movement"]
    np.testing.assert_allclose(parts, whole, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_observed_and_left_as_found(name):
    model = adapted(name, k=2, t=1, p=1).train()
    before, outputs = adapter_state(model), [p.requires_grad for p in model.parameters()]
    observed = observe(model, batches_for(name, samples=8, size=4), samples=8, progress=False)
    assert observed.layers and observed.routing
    for routing in observed.routing.values():
        assert len(routing.features) == len(routing.group) == 8
    assert model.training and [p.requires_grad for p in model.parameters()] == outputs
    assert_same_state(adapter_state(model), before)
    assert group_movement(observed)["movement"].max() > 0


def test_batches_that_are_routed_as_one_are_units():
    observed = observe(adapted("bert", routing="batch"), batches_for("bert", samples=12, size=4), progress=False)
    assert len(observed.routing[""].group) == 3


def test_layers_before_the_router_have_one_expert():
    observed = observe(adapted("bert", router_depth=1), [batch_for("bert")], progress=False)
    first = next(layer for name, layer in observed.layers.items() if ".layer.0." in name)
    assert first.experts.shape == (1, 1) and first.groups[0] > 0


def test_labels_are_taken_out_of_the_batch():
    batches = [{**batch, "domain": torch.arange(4)} for batch in batches_for("bert", samples=8, size=4)]
    observed = observe(adapted("bert"), batches, labels="domain", progress=False)
    assert observed.labels.tolist() == [0, 1, 2, 3] * 2
    observed = observe(adapted("bert"), batches_for("bert", samples=8, size=4), labels="labels", progress=False)
    assert len(observed.labels) == 8


def test_bad_data_is_refused_with_the_model_left_as_it_was():
    model = adapted("bert").train()
    with pytest.raises(ValueError, match="no batch to observe"):
        observe(model, [], progress=False)
    with pytest.raises(ValueError, match="labels='task' is no entry of the batch, which holds input_ids"):
        observe(model, [batch_for("bert")], labels="task", progress=False)
    batch = {**batch_for("bert"), "task": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"labels='task' has shape \(1,\), but the batch has"):
        observe(model, [batch], labels="task", progress=False)
    with pytest.raises(ValueError, match=r"of the batch, which holds a tuple"):
        observe(model, [(1,)], labels="task", progress=False)
    assert model.training


# Router maps


@pytest.mark.parametrize("affinity", ["cosine", "distance", "paper"])
def test_a_map_shows_the_routes_that_were_taken(affinity):
    model = adapted("bert", affinity=affinity, k=3, calibrate=False)
    observed = observe(model, batches_for("bert", samples=40, size=10), progress=False)
    found = routes.router_map(observed)
    assert found.points.shape == (40, 2) and found.centroids.shape == (3 * 2, 2)
    assert np.array_equal(found.groups, observed.routing[""].group)
    assert 0 < found.explained.sum() <= 1 and set(np.unique(found.regions.group)) <= {0, 1, 2}


def test_regions_of_a_plane_are_the_routers_own(monkeypatch):
    """In two dimensions the plane is the whole feature space."""
    centroids = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    points = np.random.default_rng(0).normal(size=(30, 2))
    for affinity in ("cosine", "distance"):
        config = tucka.TuckAConfig(k=3, t=1, affinity=affinity)
        found = routes._pca_map(points, centroids, np.zeros(30), config)
        x, y = np.meshgrid(found.regions.x, found.regions.y)
        # Distances survive the rotation of PCA, so the nearest mark decides.
        flat = np.stack([x.ravel(), y.ravel()], -1)
        if affinity == "distance":
            nearest = np.linalg.norm(flat[:, None] - found.centroids, axis=-1).argmin(1)
            assert np.array_equal(found.regions.group.ravel(), nearest)
        assert set(np.unique(found.regions.group)) == {0, 1, 2}


def test_tsne_places_every_unit():
    observed = observe(adapted("bert"), batches_for("bert", samples=8, size=4), progress=False)
    found = routes.router_map(observed, method="tsne")
    assert found.points.shape == (8, 2) and found.regions is None and np.isfinite(found.points).all()


def test_maps_that_cannot_be_made_say_why():
    observed = observe(adapted("bert"), batches_for("bert", samples=8, size=4), progress=False)
    with pytest.raises(ValueError, match="method is one of pca, tsne, umap, got 'lda'"):
        routes.router_map(observed, method="lda")
    with pytest.raises(ValueError, match="tower 'vision' is not one of"):
        routes.router_map(observed, "vision")
    with pytest.raises(ValueError, match="nothing was routed"):
        routes.router_map(observed._replace(routing={}))
    with pytest.raises(ValueError, match="routers; name the tower"):
        routes.router_map(observe(adapted("clip"), [batch_for("clip")], progress=False))
    routing = observed.routing[""]
    spoilt = routing._replace(features=routing.features * np.nan)
    with pytest.raises(ValueError, match="not finite"):
        routes.router_map(observed._replace(routing={"": spoilt}))


# Labels and loads


def test_mutual_information_of_known_tables():
    groups, labels = np.array([0, 0, 1, 1]), np.array(["a", "a", "b", "b"])
    table = routes.label_table(groups, labels, count=3)
    assert table.columns.tolist() == [0, 1, 2] and table.loc["a"].tolist() == [2, 0, 0]
    assert routes.mutual_information(table) == {"bits": pytest.approx(1), "normalised": pytest.approx(1)}
    independent = routes.label_table(np.array([0, 1, 0, 1]), labels)
    assert routes.mutual_information(independent)["bits"] == pytest.approx(0, abs=1e-12)
    alone = routes.label_table(np.zeros(4, int), labels)
    assert routes.mutual_information(alone)["normalised"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="3 groups and 4 labels"):
        routes.label_table(groups[:3], labels)


def test_mutual_information_is_scikit_learns():
    from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

    rng = np.random.default_rng(0)
    groups, labels = rng.integers(0, 4, 200), rng.integers(0, 5, 200)
    found = routes.mutual_information(routes.label_table(groups, labels))
    assert found["bits"] == pytest.approx(mutual_info_score(labels, groups) / np.log(2))
    assert found["normalised"] == pytest.approx(normalized_mutual_info_score(labels, groups))


def test_loads_are_read_from_a_trainers_log():
    log = [
        {"loss": 1.0, "step": 5, "load/group_0": 0.25, "load/group_1": 0.75, "load/max_violation": 0.5},
        {"eval_loss": 1.0, "step": 5, "eval_load/group_0": 1.0, "eval_load/group_1": 0.0},
        {"loss": 1.0, "step": 10, "load/vision/group_0": 0.5},
    ]
    found = routes.load_history(log)
    assert found.to_numpy().tolist() == [[5, 0, 0.25], [5, 1, 0.75]]
    assert routes.load_history(log, "eval_load")["share"].tolist() == [1.0, 0.0]
    assert routes.load_history(log, tower="vision")["step"].tolist() == [10]
    assert routes.load_history([{"loss": 1.0}]).columns.tolist() == ["step", "group", "share"]
