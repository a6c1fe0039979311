"""Spectra of calibration tensors, and ranks from one budget."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import adapted, adapter_state, assert_same_state, batch_for, batches_for, build, plain_config, started
from torch import nn

import tucka
from tucka.model import layers_of
from tucka.ranks import adapter_parameters, spectra, suggest_ranks
from tucka.ranks.choice import Unit, spread
from tucka.ranks.families import pattern_for

ARCHITECTURES = ["bert", "vit", "gpt2", "llama", "t5", "clip"]
FIELDS = dict(k=2, t=2, affinity="cosine", init_router="kmeans", init_experts="gradient")


def trained_parameters(model):
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".tucka_" in name)


# --- known ranks -----------------------------------------------------------------------------------------------------


class Synthetic(nn.Module):
    """Two layers that see inputs of four clusters, whose second moments span what the test says."""

    def __init__(self, width=12):
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)

    def forward(self, x, target=None):
        return self.first(x) + self.second(x.flip(-1))


def known_rank_batches(rank=3, width=12):
    """Samples of 2·2 clusters; x lies in a plane of that rank whose use differs from cluster to cluster."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64)).Q
    means = 8 * torch.randn(4, rank, generator=generator, dtype=torch.float64)
    spread_of = torch.rand(4, rank, generator=generator, dtype=torch.float64)
    coordinates = torch.randn(4, 30, 5, rank, generator=generator, dtype=torch.float64)
    x = (coordinates * spread_of.view(4, 1, 1, rank) + means.view(4, 1, 1, rank)) @ basis.mT
    return [x.flatten(0, 1)[torch.randperm(120, generator=generator)]]


@pytest.mark.parametrize("form, tied", [("multiplicative", True), ("multiplicative", False), ("additive", False)])
def test_known_ranks_are_found_and_kept(form, tied):
    model, batches = Synthetic().double(), known_rank_batches(3)
    config = plain_config(**{**FIELDS, "form": form, "tie_factors": tied, "pooling": "mean", "init_experts": "hosvd",
                             "target_modules": ["first", "second"], "routing": "sample"})  # fmt: skip
    found = spectra(model, batches, config=config, samples=120)
    additive = form == "additive"
    for line in found.layers:
        assert line.rank_for(1 - 1e-9, "input") == 3
        assert float(line.kept[-1, 2]) == pytest.approx(1) and float(line.kept[-1, 1]) < 1 - 1e-6
        assert line.effective_rank("input") <= 3 + 1e-6
        assert line.kept.shape == (2, 12) and bool((line.kept.diff(dim=1) > -1e-9).all())
    tuckered = plain_config(
        **{**config.to_dict(), "rank_pattern": {"first|second": 3}, "target_modules": ["first", "second"]}
    )
    budget = adapter_parameters(tucka.apply(Synthetic().double(), tuckered))
    suggested = suggest_ranks(model, batches, budget=budget, config=config, samples=120)
    ranks = [suggested.rank_pattern[pattern_for(name)] for name in ("first", "second")]
    assert ranks == [3, 3]
    assert additive or found["first"].rank_for(0.999999, "output") == 3
    with pytest.raises(KeyError, match="'third' is none of 2 layers"):
        found["third"]


def test_spectra_against_the_formed_tensor():
    """Singular values and kept energy from unfoldings of the moments that a start is made of."""
    model = started("bert", dtype=torch.float64, batches=batches_for("bert", dtype=torch.float64), init_experts="hosvd")
    batches = batches_for("bert", dtype=torch.float64)
    found = spectra(model, batches)
    x = torch.cat(list(found["bert.encoder.layer.0.attention.self.query"].values.values()))
    assert found.tensor == "activation" and bool((x >= 0).all())
    for line in found.layers:
        energies = [float(values.square().sum()) for values in line.values.values()]
        assert np.allclose(energies, energies[0]), "every unfolding holds the same energy"
        assert float(line.kept[-1, -1]) == pytest.approx(1)
        bound = line.values["input"].square().cumsum(0) / energies[0]
        assert bool((line.kept[-1] <= bound[: line.kept.shape[1]] + 1e-9).all()), "no more than one mode keeps"
    assert "effective rank" in str(found)


def test_an_effective_rank():
    line = tucka.ranks.LayerSpectrum("x", {"input": torch.ones(4), "output": torch.zeros(3)}, torch.ones(1, 1))
    assert line.effective_rank("input") == pytest.approx(4) and math.isnan(line.effective_rank("output"))
    assert line.rank_for(0.5, "input") == 2 and line.rank_for(0.9, "output") == 0


# --- the choice ------------------------------------------------------------------------------------------------------


def best_of_all(units, budget, fixed):
    sizes = itertools.product(*(range(len(unit.costs)) for unit in units))
    fitting = [s for s in sizes if fixed + sum(u.costs[i] for u, i in zip(units, s)) <= budget]
    return max(sum(u.gains[i] for u, i in zip(units, s)) for s in fitting)


@pytest.mark.parametrize("seed", range(30))
def test_greedy_against_all_choices(seed):
    rng = np.random.default_rng(seed)
    units = []
    for index in range(4):
        ranks, width, slices = np.arange(1, 6), rng.integers(4, 40), rng.integers(1, 5)
        gains = np.cumsum(rng.exponential(size=5) * rng.choice([0.05, 1.0], size=5))
        units.append(Unit(str(index), [int(width * r + slices * r * r) for r in ranks], (gains / gains[-1]).tolist()))
    least, most = (sum(unit.costs[end] for unit in units) for end in (0, -1))
    for budget in rng.integers(least + 7, most + 7, size=5).tolist():
        chosen = spread(units, budget, fixed=7)
        assert 7 + sum(unit.costs[i] for unit, i in zip(units, chosen)) <= budget
        found, best = sum(unit.gains[i] for unit, i in zip(units, chosen)), best_of_all(units, budget, 7)
        assert found >= best - 1 - 1e-9, "less than one unit's whole gain is lost"
        assert found >= 0.8 * best
    assert spread(units, most + 7, fixed=7) == [4] * 4


def test_greedy_takes_the_best_where_it_can_be_told():
    """Concave gains and equal steps: greedy is exact; and a gain beyond a flat step is seen."""
    units = [Unit("a", [1, 2, 3], [0, 3, 5]), Unit("b", [1, 2, 3], [0, 2, 3])]
    for budget in range(2, 7):
        chosen = spread(units, budget)
        assert sum(u.gains[i] for u, i in zip(units, chosen)) == best_of_all(units, budget, 0)
    assert spread([Unit("a", [1, 2, 3], [0, 0, 9]), Unit("b", [1, 2], [0, 1])], 4) == [2, 0]


# --- suggested ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_factors", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_suggested_ranks_keeps_the_budget(name, share_factors):
    config = plain_config(**FIELDS, share_factors=share_factors)
    model = build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    structure = [(key, type(module), module.training) for key, module in model.named_modules()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    held, drawn = set(vars(model)), torch.random.get_rng_state()
    suggested = suggest_ranks(model, batches_for(name), budget=6000, config=config)
    assert [(key, type(module), module.training) for key, module in model.named_modules()] == structure
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == hooks
    assert set(vars(model)) == held and torch.equal(torch.random.get_rng_state(), drawn)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert config.rank_pattern is None
    wrapped = tucka.apply(model, suggested, calibration=batches_for(name), progress=False)
    used = trained_parameters(wrapped)
    assert adapter_parameters(wrapped) == used and 4500 < used <= 6000
    for layer in layers_of(wrapped):
        assert layer.tucka_experts["default"].core.shape[-1] == suggested.rank_pattern[pattern_for(layer.name)]
    wrapped(**batch_for(name))


@pytest.mark.parametrize("fields", [
    dict(trainable="core"), dict(shared_expert=False), dict(router_depth=1), dict(form="additive"), dict(lasso=0.1),
    dict(tie_factors=False), dict(p=1, t=3, k=3), dict(pooling="mean"), dict(init_experts="identity"),
])  # fmt: skip
def test_the_closed_forms_count_what_trains(fields):
    config = plain_config(**{**FIELDS, "share_factors": True, **fields})
    suggested = suggest_ranks(build("bert"), batches_for("bert", 24), budget=5000, config=config)
    model = tucka.apply(build("bert"), suggested)
    assert adapter_parameters(model) == trained_parameters(model) <= 5000


def test_a_wrapped_model_is_left_as_found():
    for model in (started("bert", init_experts="gradient"), adapted("bert", calibrate=False)):
        state, config = adapter_state(model), model.peft_config["default"]
        suggested = suggest_ranks(model, batches_for("bert"), budget=6000)
        assert_same_state(adapter_state(model), state)
        assert suggested is not config and config.rank_pattern is None and len(suggested.rank_pattern) == 11
    with pytest.raises(ValueError, match="the model is adapted, so its layers and clusters are its adapter's"):
        suggest_ranks(model, batches_for("bert"), budget=6000, config=config)


def test_the_model_is_left_as_found_when_the_loader_raises():
    model = build("bert").train()

    def failing():
        yield batch_for("bert")
        raise OSError("disk")

    structure, held = [(key, type(module)) for key, module in model.named_modules()], set(vars(model))
    for loader, error, message in (
        (failing(), OSError, "disk"),
        ([], ValueError, "calibration yields no batch"),
        ([{"input_ids": torch.ones(9, 4, dtype=torch.long)}] * 2, ValueError, "needs a loss"),
    ):
        with pytest.raises(error, match=message):
            suggest_ranks(model, loader, budget=6000, config=plain_config(**FIELDS))
        assert [(key, type(module)) for key, module in model.named_modules()] == structure
        assert set(vars(model)) == held and all(m.training for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())


def test_a_budget_below_the_minimum_names_both():
    config = plain_config(**FIELDS)
    least = adapter_parameters(tucka.apply(build("bert"), plain_config(**{**FIELDS, "r": 1})))
    with pytest.raises(ValueError, match=rf"budget={least - 1} parameters are too few: .* has {least}, \d+ of them"):
        suggest_ranks(build("bert"), batches_for("bert"), budget=least - 1, config=config)
    suggested = suggest_ranks(build("bert"), batches_for("bert"), budget=least, config=config)
    assert set(suggested.rank_pattern.values()) == {1}
    with pytest.raises(ValueError, match="max_rank=0 is not a whole number of at least 1"):
        suggest_ranks(build("bert"), batches_for("bert"), budget=6000, config=config, max_rank=0)


def test_a_pattern_matches_one_layer_alone():
    from peft.utils.other import get_pattern_key

    names = ["a.b", "x.a.b", "axb", "a.b(c)+[d]", "h.0.a", "h.10.a", "0.a"]
    for name in names:
        assert [other for other in names if get_pattern_key([pattern_for(name)], other) == pattern_for(name)] == [name]
