"""Two real processes: the global batch routed as one."""

import torch
import torch.multiprocessing as mp
from torch import distributed, nn

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


def worker(rank, directory):
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    uneven = data()[:1] if rank == 0 else data()[1:]
    route, gradient = route_and_gradient(build(sync=True), uneven, 1.0)
    distributed.all_reduce(gradient)
    local, _ = route_and_gradient(build(sync=False), uneven, 1.0)
    torch.save((route, gradient, local), f"{directory}/{rank}.pt")
    distributed.destroy_process_group()


def test_a_synchronised_route_is_the_route_of_the_global_batch(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    expected, gradient = route_and_gradient(build(sync=False), data(), 1.0)
    for rank in range(2):
        route, found, local = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert torch.equal(route.group, expected.group)
        torch.testing.assert_close(route.gates, expected.gates)
        torch.testing.assert_close(found, gradient)
        assert not torch.allclose(local.gates, expected.gates)
