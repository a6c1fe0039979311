"""Models whose own code breaks the graph of torch.compile: an adapter adds no break and keeps its route through it."""

import torch
from conftest import adapter_state, plain_config, randomise
from torch import nn
from torch._dynamo.utils import counters

import tucka


class Breaking(nn.Module):
    """What prints, or asks for a number, in the midst of a forward."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return torch.relu(x)


class Model(nn.Module):
    """Breaks between its two linear layers, of which the first takes the route and the second reads it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), Breaking(), nn.Linear(6, 4))

    def forward(self, x, attention_mask):
        return self.layers(x)


def trained(compiled):
    """Routes, gradients and what training wrote to the router, after steps on batches of two sizes."""
    torch.manual_seed(0)
    fields = dict(r=3, k=3, init_router="kaiming", balance_bias=True, balance_rate=0.1, target_modules=["0", "2"])
    model = randomise(tucka.apply(Model(), plain_config(**fields))).train()
    call = torch.compile(model, backend="eager", dynamic=True) if compiled else model
    with tucka.record_routes(model) as routes:
        for samples in (5, 3):
            call(torch.randn(samples, 4, 6), torch.ones(samples, 4, dtype=torch.long)).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return [field for route in routes for field in route], gradients, adapter_state(model)


def test_breaks_of_the_base_model():
    torch._dynamo.reset()
    counters.clear()
    found = trained(compiled=True)
    reasons = list(counters["graph_break"])
    torch._dynamo.reset()
    assert reasons and all("torch._dynamo.graph_break()" in reason for reason in reasons), reasons
    expected = trained(compiled=False)
    assert len(found[0]) == len(expected[0]) == 6
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
