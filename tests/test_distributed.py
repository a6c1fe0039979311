"""Two real processes: the global batch routed as one, and one start for all."""

from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from conftest import PLAIN, adapter_state, assert_same_state, batch_for, batches_for
from conftest import build as build_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import tucka


def build(sync):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    config = tucka.TuckAConfig(
        r=3, target_modules=["0"], routing="batch", sync_route=sync, init_router="kaiming", init_experts="kaiming"
    )
    return tucka.apply(model, config)


def data():
    return torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def route_and_gradient(model, x, scale):
    with tucka.record_routes(model) as routes:
        output = model(x)
    (output.square().sum() * scale).backward()
    router = tucka.model.layers_of(model)[0].tucka_router["default"]
    return routes[0].detach(), router.centroids.grad


# --- starts ----------------------------------------------------------------------------------------------------------

CALIBRATED = {
    "kmeans, gradient": dict(init_router="kmeans", init_experts="gradient", warm_start=0.5, affinity="distance"),
    "kmeans_balanced, hosvd, core": dict(init_router="kmeans_balanced", init_experts="hosvd", trainable="core"),
    "perturb, one route": dict(init_router="perturb", routing="batch", sync_route=True),
    "kmeans, one route": dict(init_router="kmeans", init_experts="hosvd", routing="batch", sync_route=True),
}
UNCALIBRATED = {
    "perturb": dict(init_router="perturb"),
    "kmeans": dict(init_router="kmeans", affinity="cosine"),
    "kmeans_balanced": dict(init_router="kmeans_balanced", affinity="distance", balance_bias=True),
}


def adapter(fields, rank, **options):
    """An adapter on the same base model; what is random beside that differs between processes."""
    base = build_model("bert")
    torch.manual_seed(100 + rank)
    config = tucka.TuckAConfig(**{**PLAIN, "r": 4, "k": 2, "share_factors": True, **fields})
    return tucka.apply(base, config, progress=False, **options)


def shard(rank):
    """Batches of one process: other samples, another number of them, batches of another size."""
    batches = batches_for("bert", samples=24, size=4)
    return batches[:2] if rank == 0 else [{key: value[:3] for key, value in batch.items()} for batch in batches[2:]]


def first_training_steps(fields, rank):
    """The adapter's state after the first forward under DistributedDataParallel, and after two steps."""
    model = adapter(fields, rank).train()
    parallel = DistributedDataParallel(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    states = []
    for samples in (4 + rank, 5 - rank):
        loss = parallel(**batch_for("bert", samples=samples)).loss
        states.append(adapter_state(model))
        loss.backward()  # raises in the next forward if a parameter had no gradient
        optimiser.step(), optimiser.zero_grad()
    return [*states, adapter_state(model)]


def worker(rank, directory):
    store = f"file://{directory}/store"
    patience = timedelta(seconds=120)  # processes that disagree about what to exchange wait for each other
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    uneven = data()[:1] if rank == 0 else data()[1:]
    route, gradient = route_and_gradient(build(sync=True), uneven, 1.0)
    distributed.all_reduce(gradient)
    local, _ = route_and_gradient(build(sync=False), uneven, 1.0)
    found = {"routes": (route, gradient, local)}
    for case, fields in CALIBRATED.items():
        found["calibrated", case] = adapter_state(adapter(fields, rank, calibration=shard(rank)))
    for case, fields in UNCALIBRATED.items():
        found["uncalibrated", case] = first_training_steps(fields, rank)
    torch.save(found, f"{directory}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(directory),), nprocs=2)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_a_synchronised_route_is_the_route_of_the_global_batch(ranks):
    expected, gradient = route_and_gradient(build(sync=False), data(), 1.0)
    for found in ranks:
        route, summed, local = found["routes"]
        assert torch.equal(route.group, expected.group)
        torch.testing.assert_close(route.gates, expected.gates)
        torch.testing.assert_close(summed, gradient)
        assert not torch.allclose(local.gates, expected.gates)


@pytest.mark.parametrize("case", CALIBRATED)
def test_a_calibration_of_different_shards_gives_one_start(ranks, case):
    """Bit for bit the first process's; alone, that process would have started so too."""
    first, second = (found["calibrated", case] for found in ranks)
    assert_same_state(second, first)
    if "one route" not in case:
        assert_same_state(first, adapter_state(adapter(CALIBRATED[case], 0, calibration=shard(0))), 1e-6)


def test_a_synchronised_calibration_sees_the_samples_of_one_process(ranks):
    """Samples are looked at one by one: they are not added up with those another process holds at the same place."""
    case = "kmeans, one route"
    alone = adapter({**CALIBRATED[case], "sync_route": False}, 0, calibration=shard(0))
    assert_same_state(ranks[0]["calibrated", case], adapter_state(alone), 1e-6)


@pytest.mark.parametrize("case", UNCALIBRATED)
def test_the_first_training_forward_starts_all_processes_alike(ranks, case):
    for first, second in zip(*(found["uncalibrated", case] for found in ranks)):
        if "balance_bias" not in UNCALIBRATED[case]:
            assert_same_state(second, first)
            continue
        # The bias counts each process's own load until the next forward takes the first one's buffers.
        without = [{k: v for k, v in state.items() if "balance_bias" not in k} for state in (second, first)]
        assert_same_state(*without)
    started, trained = (ranks[0]["uncalibrated", case][step] for step in (0, -1))
    (centroids,) = (key for key in started if key.endswith("centroids"))
    assert any(not torch.equal(value, trained[key]) for key, value in started.items() if key != centroids)
