"""Load of the groups: measures, the meter against recorded routes, and the balancing bias."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import adapted, batch_for, build, plain_config, router_of, text_batch
from peft import PeftModel
from test_device_sync import Watch, layer_step, no_host_copies  # noqa: F401
from torch import distributed, nn

import tucka
from tucka.balance import Load, LoadMeter, bias_step, coefficient_of_variation, entropy, max_violation, record_loads


def counted(routes, groups, experts):
    """Units per expert, by a slow loop over recorded routes."""
    counts = torch.zeros(groups, experts, dtype=torch.int64)
    for route in routes:
        for group, gates in zip(route.group.tolist(), route.gates.tolist()):
            counts[group, gates.index(max(gates))] += 1
    return counts


def assert_load(load, counts):
    units = int(counts.sum())
    assert isinstance(load, Load) and int(load.units) == units > 0
    torch.testing.assert_close(load.expert_share, counts / units)
    torch.testing.assert_close(load.group_share, counts.sum(1) / units)


class TestMeasures:
    @pytest.mark.parametrize("groups", [2, 3, 8])
    def test_against_the_formulas(self, groups):
        share = np.random.default_rng(groups).dirichlet(np.ones(groups), size=5)
        given = torch.from_numpy(share)
        expected = -(share * np.log(share)).sum(-1) / math.log(groups)
        np.testing.assert_allclose(entropy(given), expected)
        np.testing.assert_allclose(coefficient_of_variation(given), share.std(-1) / share.mean(-1))
        np.testing.assert_allclose(max_violation(given), share.max(-1) / share.mean(-1) - 1)

    def test_even_loads_and_a_single_user(self):
        even, single = torch.full((4,), 0.25), torch.tensor([0.0, 1.0, 0.0, 0.0])
        assert [float(measure(even)) for measure in (entropy, coefficient_of_variation, max_violation)] == [1, 0, 0]
        assert [float(measure(single)) for measure in (entropy, max_violation)] == [0, 3]
        torch.testing.assert_close(coefficient_of_variation(single), torch.tensor(3.0).sqrt())

    def test_counts_will_do(self):
        counts = torch.tensor([3, 1, 0])
        for measure in (entropy, coefficient_of_variation, max_violation):
            torch.testing.assert_close(measure(counts), measure(counts / 4))

    def test_nothing_counted_and_a_single_group_are_numbers(self):
        measures = (entropy, coefficient_of_variation, max_violation)
        assert [float(measure(torch.zeros(3))) for measure in measures] == [0, 0, 0]
        assert [float(measure(torch.ones(1))) for measure in measures] == [1, 0, 0]


class TestMeter:
    @pytest.mark.parametrize("routing", ["sample", "batch"])
    def test_it_counts_what_is_recorded_apart_for_training_and_evaluation(self, routing):
        model = adapted("bert", routing=routing)
        with record_loads(model) as loads:
            with tucka.record_routes(model) as training:
                for samples in (2, 5, 8):
                    model.train()(**batch_for("bert", samples=samples))
            with tucka.record_routes(model) as evaluation, torch.no_grad():
                for samples in (4, 7):
                    model.eval()(**batch_for("bert", samples=samples))
        assert_load(loads.training.load(), counted(training, 3, 2))
        assert_load(loads.evaluation.load(), counted(evaluation, 3, 2))
        model(**batch_for("bert"))
        assert int(loads.evaluation.load().units) == (11 if routing == "sample" else 2), "it counted after its end"

    def test_each_tower_has_its_meter(self):
        model = adapted("clip")
        with record_loads(model) as loads, tucka.record_routes(model) as routes:
            model.eval()(**batch_for("clip"))
        assert set(loads) == {"text_model", "vision_model"}
        for tower, meter in loads.items():
            assert_load(meter.evaluation.load(), counted(routes[tower], 3, 2))

    def test_an_empty_meter_has_no_load(self):
        load = LoadMeter(3, 2).load()
        assert int(load.units) == 0
        assert torch.equal(load.group_share, torch.zeros(3)) and torch.equal(load.expert_share, torch.zeros(3, 2))

    def test_reset(self):
        meter = LoadMeter(2, 2)
        meter.append(tucka.Route(torch.tensor([1, 1, 0]), torch.rand(3, 2)))
        first = meter.load()
        meter.reset()
        assert int(meter.load().units) == 0 and int(first.units) == 3, "a load is no view of the counts"

    def test_units_beyond_single_precision(self):
        meter = LoadMeter(2, 1)
        meter.counts += 2**24
        meter.append(tucka.Route(torch.tensor([0]), torch.ones(1, 1)))
        assert int(meter.load().units) == 2**25 + 1

    def test_a_route_that_cannot_be_counted(self):
        with pytest.raises(ValueError, match="a meter of t=2 experts counts routes of that many gates, but this has 3"):
            LoadMeter(2, 2).append(tucka.Route(torch.tensor([0]), torch.ones(1, 3)))
        with pytest.raises(ValueError, match="t=2 experts counts routes of that many gates, but this has none"):
            LoadMeter(2, 2).append(tucka.Route(torch.tensor([0])))

    def test_which_adapter(self):
        model = adapted("bert")
        with (
            pytest.raises(ValueError, match=r"adapter 'other' is not one of \['default'\]"),
            record_loads(model, "other"),
        ):
            pass

    def test_in_every_gradient_mode_and_autocast(self):
        model, batch = adapted("bert").eval(), batch_for("bert")
        with torch.inference_mode(), record_loads(model) as made_there:
            model(**batch)
        model(**batch)
        made_there.append(tucka.Route(torch.tensor([0]), torch.ones(1, 2)))
        made_there.reset()
        with record_loads(model) as loads, tucka.record_routes(model) as routes:
            with torch.inference_mode():
                model(**batch)
                assert int(loads.evaluation.load().units) == 3
            with torch.no_grad():
                model(**batch)
            with torch.autocast("cpu", torch.bfloat16):
                model(**batch)
            model.train()(**batch).loss.backward()
        assert_load(loads.evaluation.load(), counted(routes[:3], 3, 2))
        assert_load(loads.training.load(), counted(routes[3:], 3, 2))

    def test_a_checkpointed_forward_counts_once(self):
        model = adapted("bert").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with record_loads(model) as loads:
            model(**batch_for("bert")).loss.backward()
        assert int(loads.training.load().units) == 3

    @pytest.mark.parametrize("routing", ["sample", "batch"])
    def test_counting_waits_for_nothing(self, routing, no_host_copies):  # noqa: F811
        base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        config = plain_config(r=3, target_modules=["0", "1"], routing=routing, init_router="kaiming")
        model = tucka.apply(base, config).train()
        x = torch.randn(3, 5, 6)
        with record_loads(model) as loads, Watch() as watch:
            layer_step(model, x).backward()
            layer_step(model, x).backward()
        assert watch.found == []
        assert torch.equal(loads.training.load().units, torch.tensor(6 if routing == "sample" else 2))

    def test_it_compiles_without_graph_break(self):
        torch._dynamo.reset()
        model = adapted("llama", target_modules="all-linear").eval()
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        batch = text_batch(3)
        with tucka.record_routes(model) as routes:
            model(**batch)
        with record_loads(model) as loads:
            for _ in range(3):
                run(**batch)
            model.train()
            run(**batch).logits.sum().backward()
        torch._dynamo.reset()
        assert_load(loads.evaluation.load(), counted(routes * 3, 3, 2))
        assert_load(loads.training.load(), counted(routes, 3, 2))


def count_in_process(rank, directory):
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = adapted("bert").eval()
    with record_loads(model) as loads, tucka.record_routes(model) as routes:
        model(**batch_for("bert", samples=3 + 2 * rank))
    meter = loads.evaluation
    found = meter.load(across_processes=True), meter.load(), counted(routes, 3, 2), meter.load(across_processes=True)
    torch.save(found, f"{directory}/{rank}.pt")
    distributed.destroy_process_group()


def test_loads_of_two_processes_add_up(tmp_path):
    mp.spawn(count_in_process, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    together = found[0][2] + found[1][2]
    assert together.sum() == 8
    for both, own, counts, again in found:
        assert_load(both, together)
        assert_load(own, counts)
        assert_load(again, together), "reading must not change the counts"


class TestBalancing:
    """Auxiliary-loss-free balancing: −γ(K−1) for the chosen group, +γ for the others, outside the gates."""

    def model(self, **fields):
        torch.manual_seed(0)
        config = plain_config(r=4, k=3, balance_bias=True, balance_rate=0.5, target_modules=["query"], **fields)
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

    @pytest.mark.parametrize("routing", ["sample", "batch"])
    def test_its_sum_stays_zero(self, routing):
        """Within 1e-4 after 2000 steps of 0.5 in single precision, with batches of uneven size."""
        model = self.model(routing=routing).train()
        router = router_of(model)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2000):
            units = int(torch.randint(0, 9, (), generator=generator))
            router.balance(torch.randint(0, 3, (units,), generator=generator))
        assert router.balance_bias.abs().max() > 1
        assert router.balance_bias.sum(0).abs().max() < 1e-4

    def test_its_sum_stays_zero_in_training(self):
        for routing in ("sample", "batch"):
            model = self.model(routing=routing).train()
            for step in range(40):
                model(**batch_for("bert", samples=2 + step % 5))
            assert router_of(model).balance_bias.any()
            assert router_of(model).balance_bias.sum(0).abs().max() < 1e-5

    def test_a_forward_of_no_units_changes_nothing(self):
        assert torch.equal(bias_step(torch.zeros(0, dtype=torch.long), groups=3, rate=0.1), torch.zeros(3))

    @pytest.mark.parametrize("routing", ["sample", "batch"])
    def test_a_forced_collapse_recovers(self, routing):
        """All groups but the first have their centroids turned away from every feature: MaxVio falls from K−1."""
        model, batches = self.model(routing=routing), [batch_for("bert", samples=n) for n in range(4, 16)]
        router = router_of(model)
        with torch.no_grad():
            router.centroids.view(3, 2, -1)[1:] = -router.centroids.view(3, 2, -1)[:1]
            router.centroids.view(3, 2, -1)[2] *= 1.5

        def violation(training):
            with record_loads(model) as loads:
                for batch in batches:
                    model.train(training)(**batch)
            return max_violation((loads.training if training else loads.evaluation).load().group_share)

        assert violation(training=False) == 2
        router.config.balance_rate = 0.05
        for _ in range(4):
            violation(training=True)
        assert violation(training=True) < 0.75
