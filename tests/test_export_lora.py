"""Groups as ordinary LoRA adapters: exact through PEFT's own loader, gaps measured, directories whole."""

import copy
import json
import math
import warnings

import pytest
import torch
from conftest import (
    adapted,
    adapter_state,
    assert_same_state,
    batch_for,
    batches_for,
    build,
    first_output,
    plain_config,
    randomise,
    started,
)
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

import tucka
from tucka.export import lora_files, to_lora
from tucka.export.factors import low_rank_updates
from tucka.export.routes import FixedRoute
from tucka.export.targets import exact_targets
from tucka.files import LOCK
from tucka.model import dispatchers_of, layers_of

PAPER = dict(routing="batch", normalize=True, init_experts="kaiming", shared_expert=False, pooling="mean")
CASES = [
    ("bert", dict(form="multiplicative", **PAPER)),
    ("bert", dict(form="additive", rank_pattern={"dense": 2}, target_modules=["query", "dense"], share_factors=True)),
    ("bert", dict(form="multiplicative", router_depth=1, normalize="bounded", share_factors=True)),
    ("bert", dict(form="additive", lasso=0.1, normalize="bounded")),
    ("vit", dict(form="additive", normalize="bounded", share_factors=True)),
    ("gpt2", dict(form="multiplicative", tie_factors=False)),
    ("gpt2", dict(form="additive", target_modules="all-linear")),
    ("llama", dict(form="multiplicative", target_modules="all-linear", share_factors=True)),
    ("llama", dict(form="multiplicative", target_modules="all-linear", share_inputs=True)),
    ("t5", dict(form="multiplicative", affinity="cosine")),
    ("clip", dict(form="additive", routing="batch")),
    ("deberta", dict(form="multiplicative", routing="batch")),
    ("bert", dict(form="additive", axis_block_size=4, share_factors=True, normalize="bounded")),
    ("gpt2", dict(form="multiplicative", axis_block_size=2, target_modules="all-linear")),
    ("llama", dict(form="multiplicative", target_modules="all-linear", share_inputs=True, axis_block_size=2)),
    ("t5", dict(form="additive", affinity="cosine", axis_block_size=1)),
]


def outputs(model, batch):
    with torch.no_grad():
        return first_output(model(**batch))


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def recorded(model, batch, unit=0):
    """The route of one unit, by tower."""
    with tucka.record_routes(model) as routes:
        outputs(model, batch)
    routes = routes if isinstance(routes, dict) else {"": routes}
    return {tower: taken[0].map(lambda field: field[unit : unit + 1]) for tower, taken in routes.items()}


def loaded(name, directory):
    return PeftModel.from_pretrained(build(name), directory).eval()


@pytest.mark.parametrize("name,fields", CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_a_lora_gives_the_outputs_of_its_route(name, fields, tmp_path):
    model, batch = adapted(name, **fields).eval(), batch_for(name)
    route = recorded(model, batch)
    state = adapter_state(model)
    report = to_lora(model, tmp_path / "lora", route)
    with tucka.pin_route(model, route):
        expected = outputs(model, batch)
    with warnings.catch_warnings():  # of a Conv1D taken for a linear layer, or the other way round
        warnings.filterwarnings("error", message="fan_in_fan_out")
        lora = loaded(name, tmp_path / "lora")
    assert relative(outputs(lora, batch), expected) < 1e-5 < relative(outputs(build(name), batch), expected)
    assert_same_state(adapter_state(model), state)

    names = {layer.name for layer in layers_of(model)}
    assert set(report.ranks) == names == set(lora.targeted_module_names)
    assert report.inexact_layers == () and report.loras[0].error is None
    assert all(one.source == "given" for one in report.loras[0].routes.values())


@pytest.mark.parametrize("normalize", [False, True, "bounded"])
@pytest.mark.parametrize("form", ["multiplicative", "additive"])
def test_updates_are_those_of_materialised_experts(form, normalize):
    """B A against α Σ w_ij 𝒯_ij and the shared slice, formed densely."""
    fields = dict(form=form, normalize=normalize, init_experts="kaiming", t=3, tie_factors=False)
    model = adapted("bert", dtype=torch.float64, **fields)
    weights = torch.rand(3, 3, dtype=torch.float64)
    weights[1] = 0
    updates = low_rank_updates(model, "default", {"": FixedRoute(weights, "given")})
    for layer in layers_of(model):
        experts = layer.tucka_experts["default"]
        _, _, u, v = experts.factors
        dense = torch.einsum("kt,ktdo->do", weights, experts.to_tensor()) + u @ experts.shared_slice @ v.mT
        dense = layer.tucka_alpha["default"] * dense
        if form == "multiplicative":
            dense = dense @ layer.get_base_layer().weight.mT
        torch.testing.assert_close(updates[layer.name].b @ updates[layer.name].a, dense.mT, rtol=1e-9, atol=1e-12)


def test_every_group_and_what_its_gates_cost(tmp_path):
    model = randomise(started("llama", k=3, affinity="cosine", init_experts="identity"), 0.2)
    batches = batches_for("llama")
    report = to_lora(model, tmp_path, loader=batches)
    assert [lora.directory.name for lora in report.loras] == ["group-0", "group-1", "group-2"]
    routes = []
    for batch in batches:
        with tucka.record_routes(model) as taken:
            outputs(model, batch)
        routes += taken
    for group, lora in enumerate(report.loras):
        ((_, held),) = lora.routes.items()
        gates = torch.cat([route.gates[route.group == group] for route in routes])
        assert (held.source, held.group, held.units) == ("samples", group, len(gates))
        torch.testing.assert_close(held.weights[group], gates.mean(0))
        squares = torch.zeros(3, dtype=torch.float64)
        models = model, loaded("llama", lora.directory), build("llama")
        for batch, route in zip(batches, routes):
            rows = (route.group == group).unsqueeze(1) & batch["attention_mask"].bool()
            routed, fixed, plain = (outputs(one, batch).double()[rows] for one in models)
            squares += torch.stack([value.square().sum() for value in (fixed - routed, routed, routed - plain)])
        error, output, update = squares.sqrt().tolist()
        assert lora.error.outputs == pytest.approx(error / output, rel=1e-3)
        assert lora.error.update == pytest.approx(error / update, rel=1e-3)
        assert lora.error.samples == len(gates) > 0
    assert "samples" in str(report) and "group-2" in str(report)
    record = json.loads((tmp_path / "tucka_export.json").read_text())
    assert record["loras"]["group-1"]["error"]["samples"] == report.loras[1].error.samples


def test_a_group_without_samples_has_the_gates_of_its_centroids(tmp_path):
    model = randomise(started("bert", k=3, affinity="distance", init_experts="identity"), 0.2)
    router = next(iter(dispatchers_of(model).values())).router("default")
    (lora,) = to_lora(model, tmp_path / "one", 2).loras
    centroid = router.placement.inverse(router.centroids[4:6].mean(0, keepdim=True))
    held = lora.routes[""]
    torch.testing.assert_close(held.weights[2], router(centroid, torch.tensor([2])).gates[0].detach())
    assert held.source == "centroids" and held.units is None and not held.weights[:2].any()
    batch = batches_for("bert")[0]
    with tucka.pin_route(model, tucka.Route(torch.tensor([2]), held.weights[2:])):
        expected = outputs(model, batch)
    assert relative(outputs(loaded("bert", tmp_path / "one"), batch), expected) < 1e-5

    alone = {key: value[:1] for key, value in batch.items()}
    report = to_lora(model, tmp_path / "all", loader=[alone])
    assert sorted(lora.routes[""].source for lora in report.loras) == ["centroids", "centroids", "samples"]
    assert [lora.error is None for lora in report.loras].count(True) == 2 and "not measured" in str(report)


@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_the_mean_route_of_a_loader(routing, tmp_path):
    model = adapted("bert", routing=routing, form="additive").eval()
    batches = batches_for("bert")
    weights = torch.zeros(3, 2)
    units = 0
    for batch in batches:
        with tucka.record_routes(model) as routes:
            outputs(model, batch)
        for group, gates in zip(routes[0].group, routes[0].gates.detach()):
            weights[group] += gates
            units += 1
    (lora,) = to_lora(model, tmp_path, "mean", loader=iter(batches)).loras
    torch.testing.assert_close(lora.routes[""].weights, weights / units)
    assert lora.routes[""].units == units and lora.error.samples == 12 and 0 < lora.error.update < math.inf
    delta = {layer.name: layer for layer in layers_of(model)}
    files = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in delta.items():
        experts = layer.tucka_experts["default"]
        mean = torch.einsum("kt,ktdo->do", weights / units, experts.to_tensor())
        shared = experts.input_mode @ experts.shared_slice @ experts.output_mode.mT
        a, b = (files[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close((b @ a).mT, 4.0 * (mean + shared).detach(), rtol=1e-4, atol=1e-5)


def test_gates_that_are_constant_are_exact(tmp_path):
    model = adapted("bert", k=1, t=1, p=1, affinity="cosine").eval()
    report = to_lora(model, tmp_path, loader=batches_for("bert"))
    assert report.loras[0].routes[""].source == "constant"
    assert report.loras[0].error.update < 1e-5
    batch = batch_for("bert")
    assert relative(outputs(loaded("bert", tmp_path / "group-0"), batch), outputs(model, batch)) < 1e-5


@pytest.mark.parametrize("bias", ["tucka_only", "all"])
def test_heads_and_biases_come_along(bias, tmp_path):
    beside = dict(modules_to_save=["classifier", "pooler"], target_modules=["query", "dense"], task_type="SEQ_CLS")
    model = adapted("bert", bias=bias, **beside).eval()
    batch = batch_for("bert")
    route = recorded(model, batch)
    to_lora(model, tmp_path, route)
    with tucka.pin_route(model, route):
        expected = outputs(model, batch)
    lora = loaded("bert", tmp_path)
    assert relative(outputs(lora, batch), expected) < 1e-5
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.peft_type, config.task_type, config.inference_mode) == ("LORA", "SEQ_CLS", True)
    assert config.bias == {"tucka_only": "lora_only"}.get(bias, bias) and "classifier" in config.modules_to_save
    assert sorted(config.target_modules) == ["dense", "query"]  # the pooler's is saved whole, so PEFT leaves it out
    assert config.lora_alpha == config.r == 4 and config.base_model_name_or_path is None


def test_ranks_differ_by_layer(tmp_path):
    model = adapted("bert", rank_pattern={"value": 2}, target_modules=["query", "value"]).eval()
    to_lora(model, tmp_path, 0)
    config = PeftConfig.from_pretrained(tmp_path)
    assert sorted(config.target_modules) == ["query", "value"] and config.r == config.lora_alpha == 4
    assert set(config.rank_pattern.values()) == {2} and config.rank_pattern == config.alpha_pattern
    lora = loaded("bert", tmp_path)
    scales = {module.scaling["default"] for module in lora.modules() if isinstance(module, peft_lora())}
    assert scales == {1.0}


def peft_lora():
    from peft.tuners.lora import LoraLayer

    return LoraLayer


def test_relative_positions_are_warned_of_and_measured(tmp_path):
    model, batches = adapted("deberta").eval(), batches_for("deberta")
    route = recorded(model, batches[0])
    with pytest.warns(UserWarning, match="2 adapted layers, .*query_proj' first, are also applied to relative pos"):
        report = to_lora(model, tmp_path / "all", route, batches)
    assert all(name.endswith("query_proj") for name in report.inexact_layers) and len(report.inexact_layers) == 2
    lora = loaded("deberta", tmp_path / "all")
    squares = torch.zeros(2)
    for batch in batches:
        routed = outputs(model, batch)
        squares += torch.stack([(outputs(lora, batch) - routed).square().sum(), routed.square().sum()])
    assert report.loras[0].error.outputs == pytest.approx(float((squares[0] / squares[1]).sqrt()), rel=1e-3)
    with tucka.pin_route(model, route):
        assert 1e-5 < relative(outputs(lora, batches[0]), outputs(model, batches[0])) < 0.05

    only_values = adapted("deberta", target_modules=["value_proj"]).eval()
    route = recorded(only_values, batches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_lora(only_values, tmp_path / "values", route)
    with tucka.pin_route(only_values, route):
        expected = outputs(only_values, batches[0])
    assert relative(outputs(loaded("deberta", tmp_path / "values"), batches[0]), expected) < 1e-5


class Nested(nn.Module):
    """Two layers of one name, one above the other."""

    def __init__(self):
        super().__init__()
        self.lin, self.block = nn.Linear(6, 6), nn.ModuleDict({"lin": nn.Linear(6, 6)})

    def forward(self, x):
        return self.block["lin"](torch.tanh(self.lin(x)))


@pytest.mark.parametrize(
    "layers,expected",
    [
        (["a.0.q", "a.1.q", "q"], ["q"]),
        (["a.0.v"], ["v"]),
        (["a.0.q"], ["a.0.q"]),
        (["q"], "q"),
        (["q", "a.0.q"], r"a\.0\.q|q"),
    ],
)
def test_targets_select_the_layers_and_nothing_else(layers, expected):
    assert exact_targets(layers, ["a", "a.0", "a.0.q", "a.1.q", "q", "a.0.v"]) == expected


def test_a_name_that_ends_another_is_told_from_it(tmp_path):
    torch.manual_seed(0)
    base, x = Nested(), torch.randn(3, 6)
    model = randomise(tucka.apply(base, plain_config(r=2, target_modules="lin", init_router="kaiming")))
    to_lora(model, tmp_path, 1)
    torch.manual_seed(0)
    lora = PeftModel.from_pretrained(Nested(), tmp_path)
    assert lora.targeted_module_names == ["lin"] or lora.base_model.targeted_module_names == ["lin"]
    gates = to_lora(model, tmp_path, 1).loras[0].routes[""].weights[1:2]
    with tucka.pin_route(model, tucka.Route(torch.tensor([1]), gates)):
        torch.testing.assert_close(lora(x), model(x))


# --- refusals, and what they leave ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untouched():
    return adapted("bert").eval()


@pytest.fixture
def model(untouched):
    return copy.deepcopy(untouched)


@pytest.mark.parametrize(
    "route,message",
    [
        (3, r"groups run from 0 to k-1=2, but the route names 3"),
        (-1, r"groups run from 0 to k-1=2, but the route names -1"),
        (True, r"route=True is no route: give a group, a Route, or 'mean' with a loader"),
        ("median", r"route='median' is no route"),
        ("mean", r"route='mean' is the mean route of a loader's samples: give loader=batches"),
        (tucka.Route(torch.tensor([0, 1])), r"an export holds one route, but the Route has 2 units; pick one"),
        (
            tucka.Route(torch.tensor([0]), torch.ones(1, 5)),
            r"gates have shape \(1, 5\), but one unit of t=2 experts needs \(1, 2\)",
        ),
        ({"text": 0}, r"the towers of the model are \[''\], but routes are given for \['text'\]"),
    ],
)
def test_routes_that_do_not_fit(untouched, route, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_lora(untouched, tmp_path / "out", route)
    assert not (tmp_path / "out").exists()


def test_other_refusals(model, tmp_path):
    with pytest.raises(TypeError, match="to_lora takes a PeftModel, but got a BertForSequenceClassification"):
        to_lora(build("bert"), tmp_path)
    with pytest.raises(ValueError, match="the loader yields no batch"):
        to_lora(model, tmp_path, 0, [])
    with pytest.raises(ValueError, match="the router has not started, so its centroids say nothing yet"):
        to_lora(adapted("bert", calibrate=False), tmp_path)
    with pytest.raises(ValueError, match=r"2 towers, each with a router of k=3 groups: give route=\{tower: group\}"):
        to_lora(adapted("clip"), tmp_path)
    with pytest.raises(ValueError, match="the model has 2 towers: give a route for each of"):
        to_lora(adapted("clip"), tmp_path, 0)
    model.add_adapter("other", plain_config(r=2, init_router="kaiming"))
    with pytest.raises(ValueError, match=r"adapter 'other' must be the only active one, but active are \['default'\]"):
        to_lora(model, tmp_path, "mean", batches_for("bert"), adapter_name="other")
    with torch.no_grad():
        layers_of(model)[1].tucka_experts["default"].core[0] = math.nan
    with pytest.raises(ValueError, match=f"the update of layer {layers_of(model)[1].name!r} is not finite"):
        to_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_not_replaced_but_an_export_is(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds an adapter \(peft_type TUCKA\) that is no export"):
        to_lora(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt is a file; an export is a directory"):
        to_lora(model, tmp_path / "notes.txt")
    place = tmp_path / "loras"
    to_lora(model, place)
    (place / "notes.txt").write_text("mine")
    assert {"group-0", "group-1", "group-2", "tucka_router.json"} <= {path.name for path in place.iterdir()}
    to_lora(model, place, 1)
    assert {path.name for path in place.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "tucka_export.json", "notes.txt", LOCK,
    }  # fmt: skip


def files_in(place):
    """Contents by path; the empty file that saves lock stays where one was tried."""
    paths = [path for path in place.rglob("*") if path.is_file() and path.name != LOCK]
    return {path.relative_to(place): path.read_bytes() for path in paths}


def test_what_fails_leaves_the_earlier_export(model, tmp_path, monkeypatch):
    to_lora(model, tmp_path / "x")
    before = files_in(tmp_path)
    calls, write = [], lora_files.save_file

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(lora_files, "save_file", failing)
    for place in ("x", "new"):
        calls.clear()
        with pytest.raises(OSError, match="no space left"):
            to_lora(randomise(model), tmp_path / place)
    assert files_in(tmp_path) == before
