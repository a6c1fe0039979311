"""The router alone names the LoRA that the whole model would have chosen."""

import json

import pytest
import torch
import transformers as tf
from conftest import adapted, batch_for, batches_for, build, randomise, started, text_batch
from peft import PeftModel

import tucka
from tucka.export import ServingRouter, to_lora
from tucka.model import dispatchers_of, layers_of


def spread(name, **fields):
    """An adapted model whose router tells samples apart."""
    fields = {"affinity": "cosine", "k": 4, "t": 1, "init_experts": "identity", **fields}
    return randomise(started(name, [batch_for(name, 12)], **fields))


def without_labels(batch):
    return {key: value for key, value in batch.items() if key not in ("labels", "return_loss")}


def chosen(model, batch):
    """Names by the whole model's routes."""
    extra = {"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else {}
    with tucka.record_routes(model) as routes, torch.no_grad():
        model(**batch, **extra)
    groups = routes[0].group.tolist()
    samples = len(next(iter(batch.values())))
    return [f"group-{group}" for group in (groups if len(groups) == samples else groups * samples)]


CASES = [
    ("bert", {}),
    ("llama", dict(pooling="mean")),
    ("vit", dict(affinity="distance")),
    ("t5", {}),
    ("gpt2", dict(routing="batch", pooling="mean")),
    ("bert", dict(router_depth=1, form="additive", share_factors=True)),
    ("llama", dict(router_depth=1, share_inputs=True, target_modules="all-linear")),
    ("llama", dict(balance_bias=True)),
    ("bert", dict(pool_padding=True)),
]


@pytest.mark.parametrize("name,fields", CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_it_chooses_what_the_model_chooses(name, fields, tmp_path):
    model = spread(name, **fields)
    if fields.get("balance_bias"):
        router = next(iter(dispatchers_of(model).values())).router("default")
        router.balance_bias[0] = 0.9  # units whose score is not far above take the first group
    left = {"left": True} if name == "llama" else {}
    batches = [without_labels(batch) for batch in (*batches_for(name), batch_for(name, 8, **left))]
    expected = [chosen(model, batch) for batch in batches]
    assert len({one for names in expected for one in names}) > 1
    ServingRouter.of(model).save(tmp_path)
    router, base = ServingRouter.load(tmp_path), build(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    assert [router.lora_for(base, batch) for batch in batches] == expected
    assert [router.lora_for(model, batch) for batch in batches] == expected
    assert [chosen(model, batch) for batch in batches] == expected
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())
    if not fields.get("router_depth"):
        assert [router.choose(*first_input(model, batch)) for batch in batches] == expected


def first_input(model, batch):
    """What enters the first adapted layer, and the mask."""
    seen = []
    handles = [layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for layer in layers_of(model)]
    with torch.no_grad():
        model(**batch, **({"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else {}))
    for handle in handles:
        handle.remove()
    return seen[0], batch.get("attention_mask")


def test_generation_keeps_the_group_that_is_named():
    model, batch = spread("llama"), text_batch(4, left=True)
    with tucka.record_routes(model) as routes:
        model.generate(**batch, max_new_tokens=3)
    named = ServingRouter.of(model, names=["a", "b", "c", "d"]).lora_for(build("llama"), batch)
    assert named == ["abcd"[group] for group in routes[-1].group.tolist()]


def test_the_first_block_is_all_it_needs():
    model, batch = spread("llama"), without_labels(batch_for("llama", 6))
    short = build("llama")
    short.model.layers = short.model.layers[:1]
    assert ServingRouter.of(model).lora_for(short, batch) == chosen(model, batch)


def test_a_mixed_batch_on_the_exported_loras(tmp_path):
    """PEFT's mixed batches stand in for an engine: each sample on the LoRA the router names."""
    model, batch = spread("llama", form="additive"), without_labels(batch_for("llama", 8))
    to_lora(model, tmp_path)
    router = ServingRouter.load(tmp_path)
    engine = PeftModel.from_pretrained(build("llama"), tmp_path / "group-0", adapter_name="group-0")
    for name in router.names[1:]:
        engine.load_adapter(tmp_path / name, adapter_name=name)
    names = router.lora_for(engine.eval(), batch)
    assert names == chosen(model, batch) and len(set(names)) > 1
    with torch.no_grad():
        mixed = engine(**batch, adapter_names=names).logits
        for index, name in enumerate(names):
            gates = json.loads((tmp_path / "tucka_export.json").read_text())["loras"][name]["routes"][""]["weights"]
            group = router.names.index(name)
            route = tucka.Route(torch.full((8,), group), torch.tensor([gates[group]] * 8))
            with tucka.pin_route(model, route):
                torch.testing.assert_close(mixed[index], model(**batch).logits[index], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the router's input depends")
def test_what_was_trained_before_the_router_is_told_of(tmp_path):
    model = spread("bert", modules_to_save=["word_embeddings"])
    randomise(model, seed=5)
    with pytest.warns(UserWarning, match=r"depends on what was trained before it: bert.embeddings.word_embeddings\. G"):
        router = ServingRouter.of(model)
    batch = without_labels(batch_for("bert", 8))
    to_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(build("bert"), tmp_path / "group-0").eval()
    assert router.lora_for(lora, batch) == chosen(model, batch) != router.lora_for(build("bert"), batch)


def test_refusals(tmp_path):
    model = adapted("bert").eval()
    router, batch = ServingRouter.of(model), without_labels(batch_for("bert"))
    with pytest.raises(ValueError, match="a router of k=3 groups needs as many names, but got 2"):
        ServingRouter.of(model, names=["a", "b"])
    with pytest.raises(ValueError, match="a serving router is one router, but the model has 2: of "):
        ServingRouter.of(adapted("clip"))
    with pytest.raises(ValueError, match="the router has not started: train or calibrate the adapter first"):
        ServingRouter.of(adapted("bert", calibrate=False))
    with pytest.raises(ValueError, match="the router's layer has 32 input features, but got 31"):
        router.choose(torch.zeros(2, 5, 31))
    with pytest.raises(ValueError, match="the attention mask covers 4 positions, the router's layer sees 5"):
        router.choose(torch.zeros(2, 5, 32), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"the model is in training mode, where dropout would choose as well"):
        router.lora_for(build("bert").train(), batch)
    with pytest.raises(ValueError, match=r"the model has none of the 11 layers that feed the router: 'bert\.encoder"):
        router.lora_for(build("llama"), batch)
    router.save(tmp_path)
    described = json.loads((tmp_path / "tucka_router.json").read_text())
    (tmp_path / "tucka_router.json").write_text(json.dumps({**described, "format_version": 9}))
    with pytest.raises(ValueError, match=r"format_version=9 of tucka_router\.json is of a later tucka"):
        ServingRouter.load(tmp_path)


class HeadFirst(tf.BertForSequenceClassification):
    """A model whose forward leaves its encoder out."""

    def forward(self, input_ids=None, **inputs):
        return input_ids


def test_a_forward_that_reaches_no_layer():
    base = HeadFirst(tf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40))
    with pytest.raises(ValueError, match="the forward reached none of the 11 layers that feed the router"):
        ServingRouter.of(adapted("bert")).lora_for(base.eval(), text_batch())
