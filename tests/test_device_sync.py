"""Nothing of a route leaves the device: no host copy, no data-dependent shape, no graph break."""

import pytest
import torch
import transformers as tf
from conftest import adapted, batch_for, plain_config, text_batch
from torch.utils._python_dispatch import TorchDispatchMode

import tucka

FORBIDDEN = (
    torch.ops.aten._local_scalar_dense,  # .item(), int(), float(), bool()
    torch.ops.aten.nonzero,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
)


class Watch(TorchDispatchMode):
    """Lists the operations run under it that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = function.overloadpacket is torch.ops.aten._to_copy and kwargs.get("device") is not None
        if function.overloadpacket in FORBIDDEN or to_host:
            self.found.append(str(function))
        return function(*args, **kwargs)


@pytest.fixture
def no_host_copies(monkeypatch):
    """`Tensor.cpu` and `Tensor.tolist` do nothing on a CPU tensor that dispatch could see, so they raise instead."""

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was copied to the host")

    for name in ("cpu", "tolist", "numpy", "item", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)


def layer_step(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_forward_and_backward_wait_for_nothing(routing, balance, no_host_copies):
    """The adapted layers alone, so that whatever the base model does is not counted."""
    base = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 4))
    config = plain_config(r=3, target_modules=["0", "1"], routing=routing, balance_bias=balance, init_router="kaiming")
    model = tucka.apply(base, config).train()
    x = torch.randn(3, 5, 6)
    with Watch() as watch:
        layer_step(model, x).backward()
    assert watch.found == []


def test_the_watch_sees_what_it_must():
    with Watch() as watch:
        int(torch.tensor(3)), torch.tensor([0, 1]).nonzero()
    assert len(watch.found) == 2


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_whole_model_waits_no_more_than_its_base(name):
    model, batch = adapted(name, target_modules="all-linear").train(), batch_for(name)
    with Watch() as adapted_watch:
        model(**batch).loss.backward()
    with model.disable_adapter(), Watch() as base_watch:
        model.enable_input_require_grads()
        model(**batch).loss.backward()
    assert sorted(adapted_watch.found) == sorted(base_watch.found)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_a_whole_llama_compiles_without_graph_break(routing, compiled):
    model = adapted("llama", target_modules="all-linear", routing=routing).train()
    batch = text_batch(3)
    run = compiled(model)

    def gradients(function):
        model.zero_grad()
        output = function(**batch).logits
        output.square().mean().backward()
        return output, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (plain, expected), (fast, found) = gradients(model), gradients(run)
    torch.testing.assert_close(fast, plain)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_decoding_with_a_static_cache_compiles(compiled):
    model = adapted("llama", target_modules="all-linear").eval()
    batch, token = text_batch(3, left=True), torch.tensor([[4], [5], [6]])
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    outputs = []
    with torch.no_grad():
        for run in (model, compiled(model)):
            cache = tf.StaticCache(config=model.config, max_cache_len=16)
            model(**batch, past_key_values=cache)
            outputs.append(run(input_ids=token, attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(outputs[1], outputs[0])


def test_an_uncalibrated_start_compiles(compiled):
    model = adapted("llama", target_modules="all-linear", calibrate=False).train()
    compiled(model)(**text_batch(3)).logits.square().mean().backward()
    router = next(r for layer in tucka.model.layers_of(model) for r in layer.tucka_router.values())
    assert router.initialised and not router.awaits_start
