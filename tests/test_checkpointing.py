"""Recomputed blocks see the route of their own forward."""

import pytest
import torch
from conftest import adapted, batch_for

import tucka


def gradients(model, batches, checkpoint=None):
    """Gradients of one backward over the losses of all batches, each in its own forward."""
    if checkpoint is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint == "reentrant"})
        model.enable_input_require_grads()
    model.train()
    model.zero_grad()
    sum(model(**batch).loss for batch in batches).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.gradient_checkpointing_disable()
    return found


@pytest.mark.parametrize("variant", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("routing", ["sample", "batch"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_gradients_of_two_forwards_equal_uncheckpointed_ones(name, routing, variant):
    model = adapted(name, torch.float64, routing=routing, target_modules="all-linear")
    batches = [batch_for(name), batch_for(name, samples=2, positions=5)]
    with tucka.record_routes(model) as routes, torch.no_grad():
        for batch in batches:
            model(**batch)
    assert routes[0].group.shape != routes[1].group.shape or not torch.equal(routes[0].gates, routes[1].gates)
    expected = gradients(model, batches)
    found = gradients(model, batches, variant)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("variant", ["reentrant", "non-reentrant"])
def test_gradient_reaches_what_lies_before_the_router(variant):
    """Trained embeddings feel the route too; a reentrant block must hand that gradient back."""
    model = adapted("llama", torch.float64, target_modules="all-linear", modules_to_save=["embed_tokens"])
    batches = [batch_for("llama"), batch_for("llama", samples=2)]
    expected, found = gradients(model, batches), gradients(model, batches, variant)
    key = next(key for key in expected if "embed_tokens" in key)
    torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)


def test_recomputation_outside_the_models_own_checkpointing_is_an_error():
    model = adapted("llama", target_modules="all-linear")
    layer = tucka.model.layers_of(model)[0]
    with pytest.raises(RuntimeError, match="reads a route but no forward of its model is open"):
        layer(torch.randn(3, 7, 32))


def test_unload_puts_the_checkpoint_function_back():
    model = adapted("llama", target_modules="all-linear")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(**batch_for("llama")).loss.backward()
    base = model.unload()
    functions = [vars(module).get("_gradient_checkpointing_func") for module in base.modules()]
    assert not any(isinstance(function, tucka.checkpointing.RouteKeepingCheckpoint) for function in functions)
