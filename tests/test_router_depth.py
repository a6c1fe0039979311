"""A router that reads a deeper block: what runs before it carries one expert that is always active."""

import copy

import pytest
import torch
from conftest import PLAIN, batch_for, build, first_output, randomise, router_of, started, text_batch
from conftest import adapted as adapted_with
from peft import PeftModel
from torch import nn

import tucka
from tucka.model import layers_of

ARCHITECTURES = ["bert", "deberta", "vit", "gpt2", "llama", "t5", "bart", "clip"]


def adapted(name, dtype=torch.float32, **fields):
    """A model whose router reads block 1, with a randomised adapter."""
    return adapted_with(name, dtype, **{"router_depth": 1, **fields})


def block_of(layer):
    """The first number in a layer's name."""
    return next((int(part) for part in layer.name.split(".") if part.isdigit()), None)


def outputs(model, batch):
    with torch.no_grad():
        return first_output(model(**batch))


def routed(model):
    return {layer.name: layer.tucka_routed["default"] for layer in layers_of(model)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_of_blocks_before_the_router_carry_a_single_expert(name):
    model = adapted(name, target_modules="all-linear", calibrate=False)
    towers = {}
    for layer in layers_of(model):
        towers.setdefault(layer.dispatcher.name, []).append(layer)
    before = 0
    for layers in towers.values():
        has_blocks = any(block_of(layer) is not None for layer in layers)
        for layer in layers:
            # A decoder's blocks run after its encoder's, whatever their number; a projection between towers has none.
            early = has_blocks and block_of(layer) == 0 and "decoder" not in layer.name
            experts = layer.tucka_experts["default"]
            if early:
                before += 1
                assert experts.core.shape == (1, 1, 4, 4) and experts.expert_factor.shape == (1, 1)
                assert experts.shared_core is None and not layer.tucka_router
            elif has_blocks and block_of(layer) is not None:
                assert experts.core.shape[0] == 3 and experts.shared_core is not None
            if "default" in layer.tucka_router and has_blocks:
                assert block_of(layer) == 1 and "decoder" not in layer.name
    assert before >= 4
    assert outputs(model, batch_for(name)).isfinite().all()


@pytest.mark.parametrize("form", ["multiplicative", "additive"])
def test_an_expert_before_the_router_acts_on_all_samples_alike(form):
    """Its update is α x U (C 𝒢) Vᵀ: the direct product, whatever the route."""
    model = adapted("bert", torch.float64, form=form, target_modules=["query"]).eval()
    layer = layers_of(model)[0]
    experts, x = layer.tucka_experts["default"], torch.randn(3, 7, 32, dtype=torch.float64)
    matrix = experts.to_tensor()[0, 0].detach() * 4.0
    base = layer.get_base_layer()
    expected = base(x + x @ matrix) if form == "multiplicative" else base(x) + x @ matrix
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)  # and no forward of the model needs to be open


def test_the_route_is_taken_from_the_input_of_the_block():
    """The feature is that of block 1's input, with the expert of block 0 at work in it."""
    model, batch = adapted("bert", pooling="mean").eval(), batch_for("bert")
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[1]
        mask = batch["attention_mask"].unsqueeze(-1)
        feature = (hidden * mask).sum(1) / mask.sum(1)
        expected = router_of(model)(feature)
        with tucka.record_routes(model) as routes:
            model(**batch)
    assert torch.equal(routes[0].group, expected.group)
    torch.testing.assert_close(routes[0].gates, expected.gates)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_identity_start_and_gradients_of_every_parameter(name):
    base, batch = build(name), batch_for(name)
    torch.manual_seed(0)
    model = tucka.apply(build(name), tucka.TuckAConfig(**{**PLAIN, "r": 4, "k": 3, "router_depth": 1})).eval()
    assert torch.equal(outputs(model, batch), outputs(base, batch))
    # A parameter without a gradient would stop DistributedDataParallel from reducing.
    randomise(model).train()(**batch).loss.backward()
    unused = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_single_and_double_precision_agree():
    single, batch = adapted("bert").eval(), batch_for("bert")
    double = copy.deepcopy(single).double()
    assert outputs(double, batch).dtype == torch.float64
    torch.testing.assert_close(outputs(single, batch).double(), outputs(double, batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_cached_generation_equals_uncached(name):
    model = adapted(name, target_modules="all-linear").eval()
    prompt = text_batch(left=name != "t5")
    options = dict(max_new_tokens=5, do_sample=False, min_new_tokens=5)
    generated = [model.generate(**prompt, **options, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*generated) and generated[0].shape[1] > 5


def test_a_prompt_keeps_its_route_while_decoding():
    model = adapted("llama", target_modules="all-linear").eval()
    batch = text_batch(padded=False)
    with torch.no_grad(), tucka.record_routes(model) as routes:
        cache = model(**batch, use_cache=True).past_key_values
        model(input_ids=batch["input_ids"][:, :1], past_key_values=cache)
    assert torch.equal(routes[0].group, routes[1].group) and torch.equal(routes[0].gates, routes[1].gates)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_saving_and_reloading(name, tmp_path):
    model, batch = adapted(name).eval(), batch_for(name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert again.peft_config["default"].router_depth == 1 and routed(again) == routed(model)
    assert torch.equal(outputs(again, batch), outputs(model, batch))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, batch = adapted("bert", torch.float64).train(), batch_for("bert")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch).loss.backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share_factors", [False, True])
def test_it_starts_from_data_like_any_other(share_factors):
    """Layers before the router see one cluster of all samples, and share factors with those behind it."""
    base, batch = build("bert"), batch_for("bert", samples=12)
    model = started("bert", [batch], router_depth=1, target_modules=["query"], share_factors=share_factors)
    assert torch.equal(outputs(model, batch), outputs(base, batch))
    first, second = (layer.tucka_experts["default"] for layer in layers_of(model))
    assert (first.input_mode is second.input_mode) == share_factors
    if share_factors:
        return
    with torch.no_grad():
        hidden = base(**batch, output_hidden_states=True).hidden_states[0].double()
    weight = batch["attention_mask"] / batch["attention_mask"].sum(1, keepdim=True) / 12
    moment = torch.einsum("bs,bsd,bse->de", weight.double(), hidden, hidden)
    leading = torch.linalg.eigh(moment)[1][:, -4:]
    found = first.input_mode.detach().double()
    torch.testing.assert_close(found @ found.T, leading @ leading.T, rtol=0, atol=1e-4)


def test_what_is_refused():
    def refused(name, message, **fields):
        with pytest.raises(ValueError, match=message):
            tucka.apply(build(name), tucka.TuckAConfig(r=4, **fields))

    lie = r"lie in blocks 0 to 1"
    refused("bert", rf"router_depth=2, but the adapted layers '\S+layer.0\S+' to '\S+' {lie}", router_depth=2)
    refused("t5", r"router_depth=7, but the adapted layers 'encoder\S+' to 'encoder\S+' lie in blocks", router_depth=7)
    refused("clip", r"router_depth=2, but the adapted layers", router_depth=2)
    only_first = dict(target_modules=["query"], layers_to_transform=[0])
    refused("bert", r"router_depth=1, but the adapted layers .* lie in blocks 0 to 0", router_depth=1, **only_first)
    for value, shown in ((-1, "-1"), (1.0, "1.0"), (True, "True"), (None, "None")):
        with pytest.raises(ValueError, match=f"router_depth={shown} is not a whole number of at least 0"):
            tucka.TuckAConfig(router_depth=value)
    with pytest.raises(ValueError, match="router_depth and router_module both say which layer feeds the router"):
        tucka.TuckAConfig(router_depth=1, router_module="query")
    flat = nn.ModuleDict({"only": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="router_depth=1 counts blocks, but no adapted layer lies in one"):
        tucka.apply(flat, tucka.TuckAConfig(r=2, router_depth=1, target_modules=["only"]))


def test_blocks_of_a_plain_sequence_count_too():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]
    config = tucka.TuckAConfig(r=2, k=2, router_depth=1, routing="batch", target_modules="all-linear")
    model = tucka.apply(nn.Sequential(*blocks), config)
    assert list(routed(model).values()) == [False, True, True]
    assert model(torch.randn(3, 4)).shape == (3, 4)
