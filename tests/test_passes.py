"""The update's passes over wide tensors against the plain operations, and what they keep for backward."""

import contextlib

import pytest
import torch
from conftest import adapted, batch_for, plain_config, randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

import tucka
from tucka import mixer, ops, passes
from tucka.model import dispatchers_of, layers_of

FORMS = ("additive", "multiplicative")


def one_layer(base, **fields):
    torch.manual_seed(0)
    config = plain_config(r=3, target_modules=["0"], init_router="kaiming", init_experts="kaiming", **fields)
    model = tucka.apply(nn.Sequential(base), config)
    randomise(model)
    return model


def run(model, x):
    """Output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x * 1.0)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@contextlib.contextmanager
def plain(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(passes, "may_overwrite", lambda base: False)
        yield


def linear(*widths):
    return nn.Linear(*widths)


def conv(width, out):
    return Conv1D(out, width)


@pytest.mark.parametrize("trainable", ["all", "core"])
@pytest.mark.parametrize("routing", ["sample", "batch"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [linear, conv])
def test_equal_to_the_plain_operations(base, form, routing, trainable, monkeypatch):
    model = one_layer(base(6, 5), form=form, routing=routing, trainable=trainable).double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    found = run(model, x)
    with plain(monkeypatch):
        expected = run(model, x)
    assert len(found) == len(expected) > 4
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [(3,), (0, 4), ()])
def test_inputs_of_any_leading_shape(rows, monkeypatch):
    model = one_layer(nn.Linear(6, 5), routing="batch")
    x = torch.randn(*(rows or (1,)), 6)
    found = run(model, x)
    with plain(monkeypatch):
        torch.testing.assert_close(found, run(model, x))


def test_a_transposed_input_and_a_transposed_gradient(monkeypatch):
    """Neither lies in memory as the passes would have it."""
    model = one_layer(nn.Linear(6, 5), routing="batch")

    def gradients():
        x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.zero_grad()
        model(x.permute(2, 1, 0)).permute(2, 0, 1).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    found = gradients()
    with plain(monkeypatch):
        torch.testing.assert_close(found, gradients())


@pytest.mark.parametrize("overwrite", [False, True])
def test_gradients_of_both_orders(overwrite):
    torch.manual_seed(0)
    base = nn.Linear(4, 3).double().requires_grad_(False)
    sizes = [(2, 2, 4), (4, 2), (2, 2, 2), (3, 2)]
    x, input_factor, mix, output_factor = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes)

    def layer(x, input_factor, mix, output_factor):
        x, projected = passes.project(x * 1.0, input_factor, True)
        return passes.add_update(base(x), projected, mix, output_factor, True, overwrite)

    assert torch.autograd.gradcheck(layer, (x, input_factor, mix, output_factor))
    assert torch.autograd.gradgradcheck(layer, (x, input_factor, mix, output_factor))


@pytest.mark.parametrize("form", FORMS)
def test_the_callers_input_is_left_alone(form):
    model, x = one_layer(nn.Linear(6, 5), form=form), torch.randn(4, 3, 6)
    before = x.clone()
    first, second = model(x), model(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_nothing_a_hook_may_have_kept_is_overwritten(hook):
    model = one_layer(nn.Linear(6, 5))
    seen = []
    getattr(layers_of(model)[0].base_layer, hook)(lambda module, given, *output: seen.append((given, output)))
    x = torch.randn(4, 3, 6, requires_grad=True)
    assert not passes.may_overwrite(layers_of(model)[0].base_layer)
    model(x * 1.0).sum().backward()
    if hook == "register_forward_hook":
        ((given,), (output,)) = seen[0]
        expected = nn.functional.linear(given, *layers_of(model)[0].base_layer.parameters())
        torch.testing.assert_close(output, expected)


def test_a_base_layer_that_keeps_its_output_is_served_plainly():
    class Squashed(nn.Linear):
        """Its backward needs its output, which must not change."""

        def forward(self, x):
            return super().forward(x).tanh()

    model, x = one_layer(Squashed(6, 5)), torch.randn(4, 3, 6, requires_grad=True)
    assert not passes.may_overwrite(layers_of(model)[0].base_layer)
    model(x).sum().backward()


def test_an_output_kept_for_backward_is_never_overwritten_in_silence():
    y = torch.randn(2, 3, 5, requires_grad=True).exp()  # its backward reads y itself
    projected, mix, factor = torch.randn(2, 3, 2), torch.randn(2, 2, 2), torch.randn(5, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        passes.add_update(y, projected, mix, factor, True, overwrite=True).sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_two_active_adapters(form, monkeypatch):
    model = adapted("bert", form=form, target_modules=["query", "dense"])
    model.add_adapter("second", plain_config(form=form, r=2, target_modules=["query", "dense"], init_router="kaiming"))
    model.base_model.set_adapter(["default", "second"])
    randomise(model)
    batch = batch_for("bert")

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    with plain(monkeypatch):
        expected = gradients()
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


# --- what is kept for backward ----------------------------------------------------------------------------------------


class Saved:
    """Bytes of the storages autograd keeps, each once."""

    def __init__(self, known):
        self.known, self.found = {tensor.untyped_storage().data_ptr() for tensor in known}, {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.found[storage.data_ptr()] = storage  # held, so that its address is nobody else's
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)
        self.bytes = sum(storage.nbytes() for storage in self.found.values())


def kept_by(targets, x, **fields):
    """Bytes kept for backward by two layers of which some are adapted, beyond parameters."""
    torch.manual_seed(0)
    width = x.shape[-1]
    config = plain_config(r=3, target_modules=targets, init_router="kaiming", init_experts="kaiming", **fields)
    model = tucka.apply(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)), config)
    with Saved([*model.parameters(), *model.buffers()]) as saved:
        model(x * 1.0)
    return saved.bytes


@pytest.mark.parametrize("trainable", ["all", "core"])
@pytest.mark.parametrize("form", FORMS)
def test_backward_keeps_the_input_and_the_projection(form, trainable):
    """Of anything as long as the batch; the input only where U is trained. The first layer feeds the router besides."""
    x = torch.randn(4, 64, 96, requires_grad=True)
    own = kept_by(["0", "1"], x, form=form, trainable=trainable) - kept_by(["0"], x, form=form, trainable=trainable)
    projection, inputs = 4 * x[..., :3].numel(), 4 * x.numel()
    mixing = 4 * (4 * 40 * 3 * 3)
    least = projection + (inputs if trainable == "all" else 0)
    assert least <= own < least + mixing


# --- mixing ----------------------------------------------------------------------------------------------------------


MIXED = (
    dict(),
    dict(shared_expert=False),
    dict(normalize=True, init_experts="kaiming"),
    dict(k=9, t=1, p=1),
    dict(lasso=0.1),
    dict(share_factors=True),
    dict(routing="batch"),
    dict(rank_pattern={"query": 3}),
)


@pytest.mark.parametrize("fields", MIXED, ids=str)
def test_layers_mixed_together_as_each_by_itself(fields):
    model = adapted("bert", target_modules="all-linear", **{"normalize": "bounded", **fields})
    randomise(model)
    with tucka.record_routes(model) as routes:
        model(**batch_for("bert"))
    layers = layers_of(model)
    together = mixer.mix_together(layers, "default", routes[0])
    assert len(together) == len(layers) > 4
    for layer in layers:
        torch.testing.assert_close(together[layer.name], mixer.mix_layer(layer, "default", routes[0]))


def count_mixing(monkeypatch):
    calls = []
    original = mixer.mix_layers
    monkeypatch.setattr(mixer, "mix_layers", lambda *args: calls.append(1) or original(*args))
    return calls


def test_decoding_mixes_once_for_a_route(monkeypatch):
    model = adapted("llama", target_modules=["q_proj"]).eval()  # layers of one shape
    calls = count_mixing(monkeypatch)
    model.generate(**{k: v for k, v in batch_for("llama").items() if k != "labels"}, max_new_tokens=6, do_sample=False)
    assert len(calls) == 1


def test_a_kept_mix_follows_its_parameters(monkeypatch):
    """The cache of one forward serves another after the parameters have moved."""
    model = adapted("llama", target_modules=["q_proj"]).eval()
    batch = {k: v for k, v in batch_for("llama").items() if k != "labels"}
    token = torch.full((len(batch["input_ids"]), 1), 5)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        calls = count_mixing(monkeypatch)
        step = dict(input_ids=token, attention_mask=mask, past_key_values=cache)
        for _ in range(3):  # the prompt's mixes are not kept: nothing says that its route will be read again
            model(**step)
            cache.crop(-1)
            assert len(calls) == 1
        layers_of(model)[0].tucka_experts["default"].core.add_(0.5)
        moved = model(**step).logits
        assert len(calls) == 2
        cache.crop(-1)
        dispatchers_of(model)[""].current.kept = None
        torch.testing.assert_close(model(**step).logits, moved, rtol=0, atol=0)


def test_a_forward_half_without_gradient_mixes_again_under_gradient():
    """An embedding network that a model runs without gradient must not lend its mixes to the rest."""

    class HalfFrozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            with torch.no_grad():
                x = self.first(x)
            return self.second(x)

    config = plain_config(r=2, target_modules=["first", "second"], init_router="kaiming", init_experts="kaiming")
    model = tucka.apply(HalfFrozen(), config)
    randomise(model)
    model(torch.randn(4, 3, 6)).sum().backward()
    first, second = (layer.tucka_experts["default"].core.grad for layer in layers_of(model))
    assert first is None or not first.any()
    assert second is not None and second.abs().max() > 0


def test_the_plain_operation_needs_no_units():
    empty = ops.add_update(torch.zeros(0, 3, 5), torch.zeros(0, 3, 2), torch.zeros(0, 2, 2), torch.randn(5, 2))
    assert empty.shape == (0, 3, 5)
