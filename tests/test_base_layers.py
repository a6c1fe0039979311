"""Base layers of any storage: the update reads no weight and casts no activation to a storage type."""

import pytest
import torch
from conftest import plain_config
from torch import nn

import tucka


class Int8Linear(nn.Linear):
    """Stores its weight as integers and a scale, as bitsandbytes' 8-bit layer does."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features)
        scale = dense.weight.abs().amax() / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((dense.weight / scale).round().to(torch.int8), requires_grad=False)
        self.bias = dense.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Float8Linear(nn.Linear):
    """Stores its weight in eight-bit floats."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features)
        self.weight = nn.Parameter(dense.weight.to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = dense.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class HalfOutputLinear(nn.Linear):
    """Computes in single precision and hands its result on in half."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features)
        self.load_state_dict(dense.state_dict())

    def forward(self, x):
        return super().forward(x).to(torch.bfloat16)


class SingleLinear(nn.Linear):
    """Computes in its own precision under autocast too, as bitsandbytes' 8-bit layer does."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype))


class HQQLinear(nn.Module):
    """No `nn.Linear` at all: packed codes under another name, known to PEFT by its class name."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.W_q = nn.Parameter((dense.weight * 16).round().to(torch.int8), requires_grad=False)
        self.bias = dense.bias

    def forward(self, x):
        return nn.functional.linear(x, self.W_q.to(x.dtype) / 16, self.bias)


@pytest.mark.parametrize("form", ["multiplicative", "additive"])
@pytest.mark.parametrize("kind", [Int8Linear, Float8Linear, HalfOutputLinear, HQQLinear])
def test_quantised_linears(kind, form):
    torch.manual_seed(0)
    quantised = kind(nn.Linear(16, 12))
    x = torch.randn(3, 5, 16, requires_grad=True)
    expected = quantised(x)
    config = plain_config(r=4, target_modules=["0"], form=form)
    model = tucka.apply(nn.Sequential(quantised), config)
    assert torch.equal(model(x), expected)
    layer = tucka.model.layers_of(model)[0]
    assert all(p.dtype == torch.float32 for name, p in layer.named_parameters() if "tucka_" in name)
    model(x).square().mean().backward()
    assert layer.tucka_experts["default"].core.grad.abs().max() > 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adapter_precision(dtype):
    """Single precision at least, whatever the base; the base's own where it is asked for."""
    from peft import get_peft_model

    config = plain_config(r=4, target_modules=["0"])
    x = torch.randn(3, 16).to(dtype)
    for keep, expected in ((False, torch.promote_types(dtype, torch.float32)), (True, dtype)):
        base = nn.Sequential(nn.Linear(16, 12).to(dtype))
        model = get_peft_model(base, config, autocast_adapter_dtype=not keep)
        layer = tucka.model.layers_of(model)[0]
        assert {p.dtype for name, p in layer.named_parameters() if "tucka_" in name} == {expected}
        assert model(x).dtype == dtype


def test_autocast_keeps_adapter_weights_and_routes_in_single_precision():
    base = nn.Sequential(nn.Linear(16, 12))
    model = tucka.apply(base, plain_config(r=4, target_modules=["0"], init_experts="kaiming"))
    x = torch.randn(3, 5, 16)
    with tucka.record_routes(model) as routes:
        model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
        output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert routes[1].gates.dtype == torch.float32
    torch.testing.assert_close(routes[0].scores, routes[1].scores, rtol=0, atol=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("form", ["multiplicative", "additive"])
def test_autocast_rounds_nothing_that_the_base_does_not_round(form):
    base = nn.Sequential(SingleLinear(16, 12))
    x = torch.randn(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = base(x)
        output = tucka.apply(base, plain_config(r=4, target_modules=["0"], form=form))(x)
    assert output.dtype == torch.float32 and torch.equal(output, expected)


def test_packed_layers_say_where_an_adapter_goes():
    """Nothing of theirs is called `weight`; PEFT itself moves the first adapter, and no other."""
    config = plain_config(r=4, target_modules=["0"])
    model = tucka.apply(nn.Sequential(HQQLinear(nn.Linear(16, 12)).to("meta")), config)
    model.add_adapter("second", config)
    layer = tucka.model.layers_of(model)[0]
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
